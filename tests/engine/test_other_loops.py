"""Loops of other libraries run with `make_private`, and with modules that are made private in place, as such libraries need."""

import copy
import inspect
import os
import pickle

import oracle
import pytest
import torch
import torch.nn.functional as F
from loops import HUGE, Net, assert_same, first_batch, gradients, private, records, small_net, truth, unchanged
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastloda import BatchMemoryManager, CrossEntropyLoss, PrivacyError, attach_loda, load_loda, make_private, save_loda

os.environ["HF_HUB_OFFLINE"] = "1"

# ---- the module itself, made private in place


def test_a_module_in_place_steps_as_a_wrapped_one():
    inner = small_net()
    names = set(inner.state_dict())
    _, optimizer, loader = private(inner, bound=0.1, wrap_model=False)
    x, y = first_batch(loader)
    wanted = oracle.clipped_sum(truth(small_net(), x, y), 0.1)
    assert type(inner) is Net and set(inner.state_dict()) == names
    assert "x" in inspect.signature(inner.forward).parameters  # Trainer reads this signature
    F.cross_entropy(inner(x), y).backward()
    assert all(p.grad is None for p in inner.parameters())
    optimizer.step()
    assert_same(gradients(inner), wanted, divisor=8)
    with torch.no_grad():
        torch.testing.assert_close(inner(x), Net.forward(inner, x))
    empty = inner(x[:0])
    assert empty.shape == (0, 3)
    empty.sum().backward()
    assert inner(x).shape == (len(x), 3)


def test_cleanup_makes_the_module_an_ordinary_one():
    inner = small_net()
    hooks, optimizer, loader = private(inner, wrap_model=False)
    x, y = first_batch(loader)
    hooks.cleanup()
    hooks.cleanup()
    F.cross_entropy(inner(x), y).backward()
    assert all(p.grad is not None for p in inner.parameters())
    with pytest.raises(PrivacyError, match="needs one loss.backward"):
        optimizer.step()


def test_what_a_module_in_place_must_not_do_is_refused():
    class Writing(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            self.seen += 1
            return super().forward(x)

    inner = Writing().double()
    _, _, loader = private(inner, wrap_model=False)
    x, _ = first_batch(loader)
    with pytest.raises(PrivacyError, match="'seen' changed"):
        inner(x)
    with pytest.raises(ValueError, match="an input of the private module requires grad"):
        inner(x.clone().requires_grad_())


def test_a_module_in_place_with_a_layer_of_its_own():
    """Its own parameter makes the fallback replace its forward at the first call; the new one must stay private."""

    class Scaled(Net):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return super().forward(x) * self.scale

    inner = Scaled().double()
    _, optimizer, loader = private(inner, wrap_model=False, bound=0.1)
    for _ in range(3):
        x, y = first_batch(loader)
        plain = Scaled().double()
        plain.load_state_dict(inner.state_dict())
        F.cross_entropy(inner(x), y).backward()
        optimizer.step()
        assert_same(gradients(inner), oracle.clipped_sum(truth(plain, x, y), 0.1), divisor=8)


@pytest.mark.parametrize("wrap_model", [False, True])
def test_a_module_in_place_may_be_made_private_again(wrap_model):
    inner = small_net()
    private(inner, wrap_model=False)
    with pytest.raises(ValueError, match="max_grad_norm"):
        private(inner, bound=-1.0)
    F.cross_entropy(inner(records()[0]), records()[1]).backward()
    assert all(p.grad is None for p in inner.parameters())  # the refused call changed nothing
    model, optimizer, loader = private(inner, bound=0.1, wrap_model=wrap_model)
    x, y = first_batch(loader)
    wanted = oracle.clipped_sum(truth(small_net(), x, y), 0.1)
    F.cross_entropy((model if wrap_model else inner)(x), y).backward()
    optimizer.step()
    assert_same(gradients(inner), wanted, divisor=8)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies_of_a_module_in_place_are_private(again):
    hooks, optimizer, loader = again(private(small_net(), noise=1.0, wrap_model=False))
    model = hooks.module
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert len(optimizer.accountant) == 3
    hooks.cleanup()
    F.cross_entropy(model(x), y).backward()
    assert all(p.grad is not None for p in model.parameters())


# ---- transformers

SIZES = dict(vocab_size=11, num_hidden_layers=1, num_attention_heads=2, hidden_size=8, intermediate_size=8)
GPT2_SIZES = dict(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=None, eos_token_id=None)
DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def causal(name):
    def make(transformers):
        if name == "GPT2":
            quiet = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
            return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2_SIZES, **quiet))
        config = getattr(transformers, f"{name}Config")(**SIZES)
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return make, lambda tokens: tokens


def bert(head, labels):
    def make(transformers):
        config = transformers.BertConfig(**SIZES, **DROPOUT, num_labels=3)
        return getattr(transformers, f"BertFor{head}")(config)

    return make, labels


LANGUAGE_MODELS = {  # name -> how to make it, and labels from tokens
    "Llama": causal("Llama"),
    "GPT2": causal("GPT2"),
    "BERT, sequences": bert("SequenceClassification", lambda tokens: tokens[:, 0] % 3),
    "BERT, tokens": bert("TokenClassification", lambda tokens: tokens % 3),
    "BERT, masked": bert("MaskedLM", lambda tokens: tokens),
}


def own_loss(model, both):
    """Compute the losses that the model itself returns for rows of tokens and labels."""
    tokens, labels = both.split(5, 1)
    return model(input_ids=tokens, labels=labels if labels.shape[1] > 1 else labels[:, 0]).loss[None]


@pytest.mark.parametrize("wrap_model", [True, False])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_compute_their_own_loss(name, wrap_model):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    make, labels_of = LANGUAGE_MODELS[name]
    torch.manual_seed(0)
    inner = make(transformers).double()
    plain, tokens = copy.deepcopy(inner), torch.randint(11, (12, 5))
    loader = DataLoader(TensorDataset(tokens, labels_of(tokens)), batch_size=4)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    options = dict(noise_multiplier=0.0, max_grad_norm=0.5, wrap_model=wrap_model)
    model, optimizer, loader = make_private(inner, optimizer, loader, **options)
    x, y = first_batch(loader)
    once = oracle.sample_grads(plain, lambda m, i: own_loss(m, i.long()), torch.cat([x, y.view(len(y), -1)], 1))
    call = model if wrap_model else inner
    out = call(input_ids=x, labels=y)
    assert isinstance(out, transformers.utils.ModelOutput)
    out.loss.backward()
    optimizer.step()
    assert_same(gradients(inner), oracle.clipped_sum(once, 0.5), divisor=4)
    for x, y in loader:
        call(input_ids=x, labels=y).loss.backward()
        optimizer.step()
    assert len(optimizer.accountant) == 4


def test_unequally_many_targets_want_a_loss_of_ones_own():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    make, _ = LANGUAGE_MODELS["Llama"]
    inner, tokens = make(transformers), torch.randint(11, (12, 5))
    loader = DataLoader(TensorDataset(tokens), batch_size=12)  # all records: one alone would be a mean
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    model, optimizer, loader = make_private(inner, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0)
    (x,) = first_batch(loader)
    padded = x.clone()
    padded[0, 3:] = -100
    out = model(input_ids=x, labels=padded, num_items_in_batch=torch.tensor(4 * len(x)))
    assert out.past_key_values is not None
    unchanged(out.loss.backward, "CrossEntropyLoss divides by a sample's own .*that of out.logits", model)
    CrossEntropyLoss()(out.logits[:, :-1].transpose(1, 2), padded[:, 1:]).backward()
    optimizer.step()
    assert len(optimizer.accountant) == 1


def test_conv1d_layers_are_adapted_and_keep_the_layout_of_their_weights(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    make, _ = LANGUAGE_MODELS["GPT2"]
    torch.manual_seed(0)
    plain = make(transformers).double().eval()
    model, tokens = copy.deepcopy(plain), torch.randint(11, (3, 5))
    adapted = attach_loda(model, rank=2)
    assert [name.rpartition(".")[2] for name in adapted] == ["c_attn", "c_proj", "c_fc", "c_proj", "lm_head"]
    assert not adapted.skipped and "rank=2" in repr(model.transformer.h[0].attn.c_attn)
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits)
    held = model.state_dict()
    assert all(
        torch.equal(t, held[name]) for name, t in plain.state_dict().items()
    )  # c_proj is square: a silent transpose
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        nn.init.normal_(p)
    save_loda(model, tmp_path / "a.safetensors")
    other = copy.deepcopy(plain)
    load_loda(other, tmp_path / "a.safetensors")
    assert torch.equal(other(tokens).logits, model(tokens).logits)
    assert not torch.allclose(other(tokens).logits, plain(tokens).logits)
    with pytest.raises(ValueError, match="rank 9 > min"):
        attach_loda(plain, rank=9, targets=transformers.pytorch_utils.Conv1D)


def test_an_adapted_conv1d_merges_and_trains_privately():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = nn.Sequential(transformers.pytorch_utils.Conv1D(5, 6), nn.Tanh(), nn.Flatten(), nn.Linear(30, 3)).double()
    attach_loda(model, rank=2, targets="0", activation="identity", scale=0.5)
    nn.init.normal_(model[0].loda_B)
    x = torch.randn(7, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(model[0].merge()(x), model[0](x))
    bare = model[0].bare()
    assert type(bare) is transformers.pytorch_utils.Conv1D and bare.weight is model[0].weight
    torch.testing.assert_close(bare(x), x @ bare.weight + bare.bias)
    private_model, optimizer, loader = private(model, bound=0.1)
    x, y = first_batch(loader)
    wanted = oracle.clipped_sum(truth_of_rows(model, x, y), 0.1)
    F.cross_entropy(private_model(x.flatten(1, 2)), y).backward()
    optimizer.step()
    assert_same(gradients(model), wanted, divisor=8)


def truth_of_rows(model, x, y):
    rows = torch.cat([x.flatten(1), y[:, None].to(x.dtype)], 1)
    losses = lambda m, r: F.cross_entropy(m(r[:, :-1].view(-1, 6, 6)), r[:, -1].long(), reduction="none")  # noqa: E731
    return oracle.sample_grads(model, losses, rows)


def test_trainer_trains_privately(tmp_path):
    """BERT computes its own loss, batches come in parts, a schedule counts steps, and Trainer keeps its other defaults."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    make, labels_of = LANGUAGE_MODELS["BERT, sequences"]
    inner, tokens = make(transformers), torch.randint(11, (24, 5))
    data = [{"input_ids": t, "labels": label} for t, label in zip(tokens, labels_of(tokens))]
    loader = DataLoader(data, batch_size=8, collate_fn=transformers.default_data_collator)
    optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-2)
    hooks, optimizer, loader = make_private(
        inner, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0, wrap_model=False
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 99)
    parts = BatchMemoryManager(data_loader=loader, max_physical_batch_size=4, optimizer=optimizer)

    class Ours(transformers.Trainer):
        def get_train_dataloader(self):
            return parts.__enter__()

    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=2, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="epoch"
    )
    trainer = Ours(inner, arguments, optimizers=(optimizer, schedule))
    before = copy.deepcopy(inner.state_dict())
    trainer.train()
    steps = len(optimizer.accountant)
    assert 3 < steps <= 6 and schedule.last_epoch == steps < trainer.state.global_step
    assert all(not torch.equal(t, before[name]) for name, t in inner.state_dict().items())
    hooks.cleanup()
    again = type(inner).from_pretrained(
        trainer.state.best_model_checkpoint or sorted(tmp_path.glob("checkpoint-*"))[-1]
    )
    assert again.state_dict().keys() == before.keys()


# ---- accelerate and Lightning


@pytest.mark.parametrize("wrap_model", [True, False])
def test_accelerate_prepares_everything(wrap_model):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    inner = small_net()
    model, private_optimizer, private_loader = private(inner, noise=1.0, wrap_model=wrap_model)
    schedule = torch.optim.lr_scheduler.StepLR(private_optimizer, 1, gamma=0.5)
    model, optimizer, loader, schedule = accelerator.prepare(
        model if wrap_model else inner, private_optimizer, private_loader, schedule
    )
    assert loader is private_loader
    for x, y in loader:
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(x), y))
        accelerator.clip_grad_norm_(inner.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    assert len(private_optimizer.accountant) == 3 and schedule.get_last_lr() == [0.125]
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts:
        for x, y in parts:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            schedule.step()
    assert len(private_optimizer.accountant) == 6 and schedule.get_last_lr() == [0.5**6]


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")  # Lightning's own
def test_lightning_fits_privately():
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    model, optimizer, loader = private(noise=1.0, bound=HUGE)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def configure_optimizers(self):
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": "step"}]

        def training_step(self, batch, _):
            return F.cross_entropy(self.model(batch[0]), batch[1])

    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    before = copy.deepcopy(model.state_dict())
    lightning.Trainer(max_epochs=2, accelerator="cpu", **options).fit(Module(), loader)
    assert len(optimizer.accountant) == 6 == round(-torch.tensor(optimizer.param_groups[0]["lr"]).log10().item())
    assert all(not torch.equal(t, before[name]) for name, t in model.state_dict().items())
