"""Adapters that make a PrivateStep of a user's own training code: it runs unchanged, is watched, and its effects are undone."""

from collections.abc import Callable, Sequence
from collections.abc import Generator as Yielding
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Generator, Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.data import Dataset

from fastloda.audit.step import PrivateStep, Records, Released, Sampler, count, count_units, same, split
from fastloda.errors import UserError
from fastloda.privacy.stats import StepStats
from fastloda.privacy.step import GhostClipper
from fastloda.privacy.watch import accept_changes
from fastloda.training.settings import PrivateTraining
from fastloda.training.trainer import DPTrainer


def of_loop(
    model: nn.Module,
    run: Callable[[Records, Generator], object],
    *,
    run_in_parts: Callable[[Records, Generator, int], object] | None = None,
) -> PrivateStep:
    """Make a PrivateStep of any library's training loop: `run(records, generator)` takes one step on `model` in place.

    The private gradient is what the optimizers find in `.grad` when they step; whatever else changes in the model's
    parameters and buffers counts as unnoised. Parameters and buffers are then restored and `.grad` is set to None; an
    optimizer's own state is not restored. Noise must come from the generator or from torch's global one (with Opacus: pass
    neither `secure_mode` nor a generator, or set `optimizer.generator = generator`).

    `run_in_parts(records, generator, parts)`, if given, takes the same step in that many micro-batches.
    """

    def watched(take_step: Callable[[], object]) -> Released:
        before = _state(model)
        kept = {name: tensor.detach().clone() for name, tensor in before.items()}
        with _gradients(model) as gradient:
            try:
                take_step()
                after = _state(model)
                changed = {name for name, t in after.items() if name not in kept or not same(t, kept[name])}
                unnoised = {name: after[name].detach().clone() for name in changed if name not in gradient}
            finally:
                _put_back(model, before, kept)
        if not gradient:
            raise UserError(
                "the step released nothing: no optimizer took a step, or none of its parameters had a .grad"
            )
        return Released(gradient, unnoised)

    parts = None
    if run_in_parts is not None:
        parts = lambda records, generator, n: watched(lambda: run_in_parts(records, generator, n))  # noqa: E731
    return PrivateStep(lambda records, generator: watched(lambda: run(records, generator)), parts, shows_state=True)


def of_ghost_step(
    model: nn.Module,
    losses: Callable[[nn.Module, Records], Tensor],
    *,
    max_grad_norm: float,
    noise_multiplier: float,
    expected_batch_size: float,
    views: int = 1,
    **clipping,
) -> PrivateStep:
    """Make a PrivateStep of GhostClipper on `model`; losses(model, records) -> [records * views], as for `ghost_dp_step`.

    `clipping` are further arguments of GhostClipper, which raises the errors.
    """
    clipper = GhostClipper(model, max_grad_norm, views=views, **clipping)
    optimizer = torch.optim.SGD(list(clipper.parameters.values()), lr=0.0)

    def run(records: Records, generator: Generator, parts: int = 1) -> None:
        clipper.reset()
        for part in split(records, parts):
            clipper.accumulate(losses(model, part))
        clipper.privatize(noise_multiplier, expected_batch_size, generator)
        optimizer.step()

    return of_loop(model, run, run_in_parts=run)


def of_trainer(
    make: Callable[..., DPTrainer],
    settings: PrivateTraining,
    records: Records,
    population: int = 200,
    owned: bool = False,
) -> PrivateStep:
    """Make a PrivateStep of a trainer's `train_step` and its sampler.

    `make(data, settings)` returns a trainer of the user's model and losses on these data, without a checkpoint. The audit
    chooses the data and the seeds, sample rate 1 where all records must be in the batch, and the micro-batch size and the
    number of steps where it needs others; all else is as in `settings`.

    To watch which records the sampler chooses, `records` are repeated to `population` rows.

    `owned`: whether the unit of privacy is an owner. The last tensor of the records, here and in `audit_step`, then has each
    record's owner, an integer, and `make(data, settings, owners)` is called, where data are the other tensors.
    """

    if settings.bands > 1:
        raise UserError(
            f"the audit looks at single steps, whose noise is independent; with bands={settings.bands} it is not. Audit the same "
            "settings with bands=1: only the noise and the choice of who may enter a step differ"
        )

    def trainer(data: "_Rows", owners: Sequence[int], generator: Generator, **changes) -> DPTrainer:
        seed = int(torch.randint(2**62, (), generator=generator))
        changed = replace(settings, seed=seed, target_epsilon=None, **changes)
        return make(data, changed, owners) if owned else make(data, changed)

    def release(records: Records, generator: Generator, parts: int = 1) -> Released:
        present, units = count(records), count_units(records, owned)
        size = -(-max(1, units) // parts) if parts > 1 else settings.micro_batch_size
        rate = 1.0 if present else NEVER
        data, owners = _Rows(records, max(1, present), owned), (records[-1].tolist() or [0]) if owned else []
        made = trainer(data, owners, generator, sample_rate=rate, micro_batch_size=size)
        return of_loop(made.model, lambda *_: made.train_step())(records, generator)

    seen = _Rows(records, population, owned)
    sampling: list[DPTrainer] = []  # one trainer for all draws, made at the first

    def draw(generator: Generator) -> list[int]:
        if not sampling:
            # one micro-batch, whose records are read before those that the trainer reads to check the data
            changes = {"steps": MANY_STEPS, "micro_batch_size": population}
            sampling.append(trainer(seen, range(population), generator, **changes))
        seen.fetched.clear()
        stats: list[StepStats] = []
        of_loop(sampling[0].model, lambda *_: stats.append(sampling[0].train_step())).release(records, generator)
        rows = settings.per_owner  # the rows of each unit, which has one record here
        return seen.fetched[: stats[0].samples * rows : rows]  # what is fetched beyond them pads the last micro-batch

    return PrivateStep(release, release, Sampler(draw, population), shows_state=True, owned=owned)


# ---- watching


@contextmanager
def _gradients(model: nn.Module) -> Yielding[dict[str, Tensor]]:
    """Collect a copy of the .grad of each parameter, by name, that any optimizer steps on inside the context."""
    found: dict[str, Tensor] = {}
    names = {id(p): name for name, p in model.named_parameters()}

    def hook(optimizer: Optimizer, *_) -> None:
        for g, group in enumerate(optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                name = names.get(id(p), f"param_groups[{g}]['params'][{i}], outside the model")
                if p.grad is None:
                    continue
                if name in found:
                    raise UserError(f"{name!r} was stepped twice: audit one step at a time")
                found[name] = p.grad.detach().clone()

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def _put_back(model: nn.Module, before: dict[str, Tensor], kept: dict[str, Tensor]) -> None:
    """Restore the model's tensors `before` to the values `kept`; write only those that changed, since steps refuse writes."""
    for name, tensor in before.items():
        if not same(tensor, kept[name]):
            tensor.copy_(kept[name])
    for name, buffer in model.named_buffers():  # a buffer that the step replaced by another tensor
        if name in before and buffer is not before[name]:
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, before[name])
    for p in model.parameters():
        p.grad = None
    accept_changes(model)


# ---- the trainer's data


NEVER = 1e-15  # a sampling rate at which no record enters
MANY_STEPS = 10**6


class _Rows(Dataset):
    """The data set of the audit's records (zeros if there are none), repeated to `length`; it lists the fetched indices.

    `owned`: whether to leave out the last tensor, which has the owners.
    """

    def __init__(self, records: Records, length: int, owned: bool):
        self._tensors = [records] if isinstance(records, Tensor) else list(records)[: -1 if owned else None]
        self._length = length
        self.fetched: list[int] = []

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.fetched.append(index)
        return tuple(t[index % len(t)] if len(t) else t.new_zeros(t.shape[1:]) for t in self._tensors)
