"""A captured step equals the clipper's own, bit for bit, on any data; what no graph can repeat is refused or not replayed.

No GPU is needed: a tape of operations (`tape.py`) stands in for a CUDA graph.
"""

import copy
import dataclasses
import random
import weakref

import oracle
import pytest
import small_runs
import tape
import torch
import torch.nn.functional as F
from torch import nn

from fastloda import AdaptiveClipping, CapturedStep, GhostClipper, PrivacyError, attach_loda
from fastloda.per_sample import refusals
from fastloda.privacy import captured
from fastloda.privacy.captured import CaptureError
from fastloda.synthesis.diffusion import digits_unet
from fastloda.training import noising
from fastloda.training.owners import OwnerBatches
from fastloda.training.trainer import DPTrainer

SAMPLES, BOUND = 5, 0.5


@pytest.fixture(autouse=True)
def _on_tape(monkeypatch):
    tape.use(monkeypatch)
    monkeypatch.setattr(refusals, "LOOK_AGAIN", 0)  # probe on the schedule only, never by chance


def convolutional(rank: int | None = 2) -> nn.Module:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 6, 3, stride=2),
    )
    model = nn.Sequential(*layers, nn.SiLU(), nn.Flatten(), nn.Linear(24, 3))
    if rank is not None:
        attach_loda(model, rank=rank)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)  # with B = 0, A would have no gradient
    return model


def batch(samples: int = SAMPLES) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(samples, 3, 6, 6), torch.randint(3, (samples,))


def loss_of(model: nn.Module):
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


def captured_step(model=None, bound: float = BOUND, **options) -> tuple[GhostClipper, CapturedStep]:
    """Make a step that replays from its next call on."""
    clipper = GhostClipper(model or convolutional(), bound, **options)
    step = CapturedStep(clipper, loss_of(clipper.model))
    x, y = batch(SAMPLES * clipper.views)
    for _ in range(5):  # calls 1 and 4 are probed; calls 2 and 5 capture
        step.accumulate(x, y)
    clipper.reset()
    return clipper, step


def replays(step: CapturedStep, *args, **options) -> bool:
    """Accumulate a batch; return whether this replayed the graph instead of calling losses."""
    called, losses = [], step._losses
    step._losses = lambda *inputs: called.append(1) or losses(*inputs)
    step.accumulate(*args, **options)
    step._losses = losses
    return not called


def sums(clipper: GhostClipper) -> torch.Tensor:
    return torch.cat([total.clone() for total in clipper._sums.buffers.values()])


STYLES = ["flat", "automatic", "per_layer", AdaptiveClipping(count_noise=0.9)]


@pytest.mark.parametrize("clipping", STYLES, ids=str)
@pytest.mark.parametrize("rank, views", [(2, 1), (2, 3), (None, 1)])
def test_steps_are_those_of_the_clipper_bit_for_bit(clipping, rank, views):
    """They agree over micro-batches, padding, updates, and a bound that moves or is set."""
    models = [convolutional(rank)]
    models.append(copy.deepcopy(models[0]))
    clippers = [GhostClipper(model, BOUND, views, clipping=clipping) for model in models]
    optimizers = [torch.optim.Adam(clipper.parameters.values(), 1e-2) for clipper in clippers]
    step, replayed = CapturedStep(clippers[1], loss_of(models[1])), 0
    for number in range(6):
        for used in (SAMPLES, SAMPLES, 2, 0):
            (x, y), mask = batch(SAMPLES * views), torch.arange(SAMPLES) < used
            x[used * views :] = torch.nan  # padding may hold any numbers
            stats = clippers[0].accumulate(loss_of(models[0])(x, y), mask)
            replayed += replays(step, x, y, mask=mask)
            assert torch.equal(sums(clippers[0]), sums(clippers[1]))
        assert stats.samples == 0 and torch.equal(clippers[0]._stats.totals, clippers[1]._stats.totals)
        for clipper, optimizer in zip(clippers, optimizers):
            clipper.privatize(1.0, 12.0, torch.Generator().manual_seed(number))
            optimizer.step()
            if clipping == "flat":
                clipper.max_grad_norm = BOUND / (number + 2)
        assert clippers[0].max_grad_norm == clippers[1].max_grad_norm
    assert replayed == 24 - 6  # batches 1, 4 and 16 are probed; each following one captures
    for p, q in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(p, q)


def test_the_sum_is_the_truth():
    clipper, step = captured_step()
    (x, y), mask = batch(), torch.tensor([True, False, True, True, True])
    assert replays(step, x, y, mask=mask)
    own_loss = lambda i: lambda model, image: loss_of(model)(image, y[i : i + 1])  # noqa: E731
    of_one = [oracle.sample_grads(clipper.model, own_loss(i), x[i : i + 1])[0] for i in range(SAMPLES)]
    wanted = oracle.clipped_sum([grads for grads, used in zip(of_one, mask) if used], BOUND)
    found = clipper._sums.by_name
    assert all(torch.allclose(found[name], total, rtol=1e-4, atol=1e-6) for name, total in wanted.items())


@pytest.mark.parametrize("bad", [1e30, torch.inf, torch.nan], ids=str)
def test_one_record_moves_the_sum_by_the_bound_at_most(bad):
    """This holds for any record, and for any data over which the graph was captured."""
    clipper, step = captured_step()
    x, y = batch()
    found = []
    for record in (torch.zeros(3, 6, 6), torch.full((3, 6, 6), bad), 100 * torch.randn(3, 6, 6)):
        x[2] = record
        assert replays(step, x, y)
        found.append(sums(clipper))
        clipper.reset()
    step.accumulate(x, y, mask=torch.arange(5) != 2)
    without = sums(clipper)
    assert all((one - without).norm() <= BOUND * (1 + 1e-5) for one in found)
    if bad != 1e30:
        assert torch.equal(found[1], without)


def test_a_replay_adds_to_what_is_there_and_starts_at_zero():
    clipper, step = captured_step()
    x, y = batch()
    assert replays(step, x, y)
    once = sums(clipper)
    clipper.reset()
    step.accumulate(x, y)
    assert torch.equal(sums(clipper), once)
    assert replays(step, x, y) and torch.equal(sums(clipper), 2 * once)
    clipper.accumulate(loss_of(clipper.model)(x, y))  # replays and the clipper's own calls may alternate
    assert torch.allclose(sums(clipper), 3 * once, rtol=1e-6)


def test_weights_are_those_of_each_call_and_so_are_the_counts():
    clipper, told = GhostClipper(convolutional(), BOUND), []
    step = CapturedStep(clipper, loss_of(clipper.model))
    for _ in range(3):
        (x, y), weights = batch(), torch.rand(5, dtype=torch.float64)
        stats, losses = step.accumulate(x, y, weights=weights)
        assert torch.equal(losses, loss_of(clipper.model)(x, y))
        assert torch.isclose(stats.totals[3], (losses * weights.float()).double().sum())
        told.append((stats.totals, stats.totals.clone()))
    assert all(torch.equal(now, then) for now, then in told)


# ---- what stays outside of the graph


def test_a_graph_is_gone_before_its_memory_is_needed_again():
    """It is dropped before a batch that is probed, and on request; then it is captured again."""
    clipper, step = captured_step()
    while not step._looks.due():
        step.accumulate(*batch())
    graph = weakref.ref(step._graph[1])
    losses = step._losses
    step._losses = lambda x, y: losses(x, y) if graph() is None else pytest.fail("both at a time")
    assert not replays(step, *batch()) and not replays(step, *batch()) and replays(step, *batch())
    step.release()
    assert not replays(step, *batch()) and replays(step, *batch())


def test_batches_that_are_due_are_probed():
    """Samples that begin to mix without Python noticing are found at the fourth batch, as by `GhostClipper.accumulate`."""
    model = convolutional()
    share = torch.zeros(SAMPLES, 1)
    clipper = GhostClipper(model, BOUND)
    step = CapturedStep(clipper, lambda x, y: F.cross_entropy((o := model(x)) + share * o.mean(0), y, reduction="none"))
    for _ in range(2):
        step.accumulate(*batch())
    assert replays(step, *batch())
    share.fill_(0.3)  # the graph reads this tensor
    with pytest.raises(PrivacyError, match="samples mix"):
        step.accumulate(*batch())


def test_chance_probes_too(monkeypatch):
    clipper, step = captured_step()
    assert replays(step, *batch())
    monkeypatch.setattr(refusals, "LOOK_AGAIN", 1.0)
    step.accumulate(*batch())
    assert not replays(step, *batch())


def test_nothing_is_replayed_before_the_probe_has_seen_every_gradient():
    model = convolutional()
    for parameter in (model[4].weight, model[4].loda_B):  # so that no gradient reaches the layers below
        nn.init.zeros_(parameter)
    clipper, step = captured_step(model)
    assert not any(replays(step, *batch()) for _ in range(3))
    nn.init.normal_(model[4].loda_B)
    clipper.watch()
    assert [replays(step, *batch()) for _ in range(3)] == [False, False, True]


def test_what_is_written_to_is_refused():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.inner, self.counts = convolutional(), False

        def forward(self, x):
            if self.counts:
                self.seen += x.detach().mean()
            return self.inner(x)

    model = Counting()
    clipper = GhostClipper(model, BOUND)
    step = CapturedStep(clipper, loss_of(model))
    step.accumulate(*batch())
    model.counts = True
    with pytest.raises(PrivacyError, match="'seen' changed"):
        step.accumulate(*batch())


@pytest.mark.parametrize("change", ["moved", "replaced", "mode"])
def test_a_model_that_moved_is_captured_anew(change):
    model = nn.Sequential(convolutional(), nn.Dropout(0.5))
    clipper, step = captured_step(model)
    x, y = batch()
    torch.manual_seed(1)
    assert replays(step, x, y)
    first = sums(clipper)
    with torch.no_grad():
        if change == "moved":
            for p in model.parameters():
                p.data = p.data.clone() * 2
        elif change == "replaced":
            model[0][0].weight = nn.Parameter(2 * model[0][0].weight, requires_grad=False)
        else:
            model.eval()
    clipper.reset()
    clipper.watch()
    torch.manual_seed(1)
    assert not replays(step, x, y)
    found = sums(clipper)
    clipper.reset()
    torch.manual_seed(1)
    clipper.accumulate(loss_of(model)(x, y))
    assert torch.equal(found, sums(clipper)) and not torch.equal(found, first)
    for _ in range(3):  # one captures, and another may be probed before it
        step.accumulate(x, y)
    clipper.reset()
    torch.manual_seed(1)
    assert replays(step, x, y) and torch.equal(found, sums(clipper))


def test_what_the_graph_reads_stays_alive():
    """Memory that was freed would hold other results."""
    model, held = convolutional(), {"scale": torch.ones(3)}
    clipper = GhostClipper(model, BOUND)
    step = CapturedStep(clipper, lambda x, y: F.cross_entropy(model(x) * held["scale"], y, reduction="none"))
    for _ in range(2):
        step.accumulate(*batch())
    address = held["scale"].data_ptr()
    assert any(t.data_ptr() == address for t in step._outside)
    assert sum(t.numel() for t in step._outside) < 20_000  # but not what a run itself computes


def test_random_numbers_go_on_from_replay_to_replay():
    model, generators = convolutional(), [torch.Generator().manual_seed(1) for _ in range(2)]
    noisy = lambda g: lambda x, y: F.cross_entropy(model(x + torch.randn(x.shape, generator=g)), y, reduction="none")  # noqa: E731
    clipper = GhostClipper(model, BOUND)
    step, (x, y) = CapturedStep(clipper, noisy(generators[0]), generators[:1]), batch()
    found = [step.accumulate(x, y)[1] for _ in range(5)]
    for losses in found:
        assert torch.equal(losses, noisy(generators[1])(x, y))


def test_the_diffusion_loss_is_captured():
    """The loss draws its own random numbers, and the tables that it looks up are already on the device."""
    model = digits_unet(zero_init=False)
    diffusion = model.process
    attach_loda(model, rank=2)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    loss = lambda g: lambda x, y: diffusion.losses(model, x, y, views=2, flips=True, generator=g)  # noqa: E731
    clipper = GhostClipper(model, BOUND, views=2)
    step, x, y = CapturedStep(clipper, loss(generators[0]), generators[:1]), torch.randn(4, 1, 8, 8), torch.arange(4)
    found = [step.accumulate(x, y)[1] for _ in range(3)]
    assert [replays(step, x, y) for _ in range(3)] == [False, False, True]  # the fourth call is probed
    tables = noising._made[diffusion.alphas_cumprod]
    for losses in found:
        assert torch.equal(losses, loss(generators[1])(x, y))
    assert len(tables) == 2 and tables is noising._made[diffusion.alphas_cumprod]
    assert all(any(t is table for t in step._outside) for table in tables.values())


# ---- refusals


def test_only_what_captures_is_taken(monkeypatch):
    monkeypatch.delitem(captured.RECORDERS, "cpu")
    with pytest.raises(CaptureError, match="only a CUDA GPU captures graphs"):
        CapturedStep(GhostClipper(convolutional(), BOUND), None)


def refuses(match: str, losses, *inputs, calls: int = 2, generators=(), then=None) -> None:
    model = convolutional()
    clipper = GhostClipper(model, BOUND)
    step = CapturedStep(clipper, losses(model) if losses else loss_of(model), generators)
    with pytest.raises(CaptureError, match=match):
        for number in range(calls):
            before = sums(clipper)
            step.accumulate(*(then if then and number else inputs or batch()))
    assert torch.equal(sums(clipper), before)


def test_varying_shapes_are_refused():
    refuses("a graph repeats one shape: pad the batch", None, then=batch(4))
    x, y = batch()
    refuses("a graph repeats one shape", None, then=(x.double(), y))


def test_what_is_no_tensor_on_the_gpu_is_refused():
    refuses("the inputs must be tensors on cpu, got a int", None, *batch(), 1)
    refuses("got a tensor on meta", None, batch()[0].to("meta"))


def test_waiting_for_the_gpu_is_refused():
    refuses("may not wait for the GPU", lambda model: lambda x, y: loss_of(model)(x / x.max().item(), y))


def test_random_numbers_of_the_host_are_refused():
    state = random.getstate()
    refuses("random numbers on the CPU", lambda model: lambda x, y: loss_of(model)(x, y) * (1 + random.random()))
    random.setstate(state)


def test_rows_that_data_picks_are_refused():
    def placed(model):
        def losses(x, y):
            logits = torch.zeros(len(x), 5)
            logits[:, 1:4] = model(x)
            return F.cross_entropy(logits, y, reduction="none")

        return losses

    refuses("the data picks or reorders rows", placed, calls=1)


def test_what_python_changed_is_refused_at_the_next_probe():
    model, factor = convolutional(), [1.0]
    clipper = GhostClipper(model, BOUND)
    step = CapturedStep(clipper, lambda x, y: loss_of(model)(x, y) * factor[0])
    for _ in range(3):
        step.accumulate(*batch())
    factor[0], before = 2.0, sums(clipper)
    with pytest.raises(CaptureError, match="follows something in Python that changed"):
        step.accumulate(*batch())
    assert torch.equal(sums(clipper), before)


def test_losses_of_changing_kinds_are_refused():
    calls = []
    turning = lambda model: lambda x, y: loss_of(model)(x, y) * (1 if calls.append(1) or len(calls) < 2 else 2)  # noqa: E731
    refuses("something else from call to call", turning)


# ---- the trainer


RUN = dataclasses.replace(small_runs.SETTINGS, steps=20)
LONG = dataclasses.replace(RUN, steps=40)


def trained(monkeypatch, graph: bool, losses=small_runs.losses, settings=RUN, **options) -> tuple[DPTrainer, int]:
    """Train with or without a graph; return the trainer and the number of replays."""
    counted, replayed = [], CapturedStep._replayed
    with monkeypatch.context() as patch:
        patch.setattr(CapturedStep, "_replayed", lambda *args: counted.append(1) or replayed(*args))
        if not graph:
            patch.delitem(captured.RECORDERS, "cpu")
        torch.manual_seed(5)
        trainer = DPTrainer(
            small_runs.small_model(), small_runs.small_data(), losses, settings, progress=False, **options
        )
        return trainer.fit(), len(counted)


@pytest.mark.parametrize("change", [{}, {"clipping": "adaptive"}, {"micro_batch_size": 30}], ids=str)
def test_a_run_is_the_same_with_a_graph(monkeypatch, change):
    settings = dataclasses.replace(RUN, **change)
    (eager, none), (graph, many) = (trained(monkeypatch, graph, settings=settings) for graph in (False, True))
    assert none == 0 and many > 10
    small_runs.assert_same_run(eager, graph)


def test_a_run_of_owners_is_the_same_with_a_graph(monkeypatch):
    options = {"owners": [record // 3 for record in range(60)]}
    settings = dataclasses.replace(RUN, per_owner=2, expected_batch_size=4, views=1)
    (eager, none), (graph, many) = (
        trained(monkeypatch, graph, settings=settings, **options) for graph in (False, True)
    )
    assert isinstance(eager._data, OwnerBatches) and none == 0 and many > 10
    small_runs.assert_same_run(eager, graph)


def test_a_run_resumes_bit_for_bit(monkeypatch, tmp_path):
    whole, _ = trained(monkeypatch, True)
    stopped = tmp_path / "b.pt"

    def stop(trainer, report):
        if report.step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(monkeypatch, True, checkpoint=stopped, callbacks=[stop])
    resumed, _ = trained(monkeypatch, True, checkpoint=stopped)
    small_runs.assert_same_run(whole, resumed)


def test_losses_that_no_graph_repeats_are_computed_without(monkeypatch):
    """The loss follows trainer.step, as a schedule does: the run warns, and is the same as without graphs."""
    made = []

    def ramped(model, batch, generator):
        return small_runs.losses(model, batch, generator) * (1.0 + made[-1].step if made else 1.0)

    class Kept(DPTrainer):
        def fit(self):
            made.append(self)
            return super().fit()

    monkeypatch.setattr(f"{__name__}.DPTrainer", Kept)
    eager, _ = trained(monkeypatch, False, ramped)
    with pytest.warns(
        UserWarning, match="without a CUDA graph, which would be faster: losses\\(\\) reads trainer.step"
    ):
        graph, replayed = trained(monkeypatch, True, ramped)
    assert replayed == 0
    small_runs.assert_same_run(eager, graph)


def test_a_graph_that_python_has_left_behind_is_given_up(monkeypatch):
    """A change in Python shows at the next batch that is probed."""
    factor = [1.25]

    def changing(model, batch, generator):
        return small_runs.losses(model, batch, generator) * factor[0]

    def change(trainer, report):
        factor[0] = 1.5 if report.step == 8 else factor[0]

    with pytest.warns(UserWarning, match="other values than a graph: it follows something in Python that changed"):
        trainer, replayed = trained(monkeypatch, True, changing, settings=LONG, callbacks=[change])
    assert trainer.step == LONG.steps and replayed > 10


def test_varied_shapes_make_no_graph(monkeypatch):
    assert trained(monkeypatch, True, settings=dataclasses.replace(RUN, fixed_shape=False))[1] == 0
