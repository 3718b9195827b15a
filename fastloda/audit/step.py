"""The step under audit: a function of records and randomness that can be called again and again."""

import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Generator as Yielding
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from fastloda.errors import UserError
from fastloda.randomness import generator_states, restore_generators

# One record a row, in one tensor or in several of the same length. A step gets records in the form that the audit was given.
Records = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Released:
    """The output of one step.

    Attributes:
        gradient: mapping from name to private gradient, noise included, as the optimizer gets it.
        unnoised: mapping from name to value of everything else that the step changed: buffers, frozen parameters.
    """

    gradient: Mapping[str, Tensor]
    unnoised: Mapping[str, Tensor] = field(default_factory=dict)

    def flat(self) -> Tensor:
        """Concatenate the gradients to one vector [d], float64, on the CPU."""
        return torch.cat([g.detach().flatten().double().cpu() for g in self.gradient.values()])

    def rounding(self) -> float:
        """Bound the norm of the rounding error, of the tensors themselves and of the numbers that they were computed from."""
        return math.hypot(*(_rounding(g.detach()) for g in self.gradient.values()))


def _rounding(g: Tensor) -> float:
    if not g.is_floating_point() or not g.numel():
        return 0.0
    limits = torch.finfo(g.dtype)  # below the smallest normal number the gaps between floats are all equal
    step = max(limits.smallest_normal * limits.eps, _common_step(g.double()))
    return limits.eps * g.double().norm().item() + step * math.sqrt(g.numel())


def _common_step(g: Tensor) -> float:
    """Compute the largest power of 2 that divides all numbers, or 0 if all are 0.

    It is large for differences of much larger floats, whose rounding error it bounds.
    """
    mantissa, exponent = torch.frexp(g[g.isfinite() & (g != 0)])
    whole = (mantissa * 2.0**53).long()
    return torch.ldexp((whole & -whole).double(), exponent - 53).min().item() if len(whole) else 0.0


def same(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors hold the same numbers; NaN equals NaN only."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


@dataclass(frozen=True)
class Sampler:
    """The sampler of a training run: draw(generator) -> the indices of one step's records, out of `population` records."""

    draw: Callable[[Generator], Sequence[int] | Tensor]
    population: int


# A function of the records and a CPU generator that returns the private gradient: a tensor, name -> tensor, or Released.
Release = Callable[[Records, Generator], Tensor | Mapping[str, Tensor] | Released]


@dataclass(frozen=True)
class PrivateStep:
    """The step as the audit sees it; only `release` is required.

    Attributes:
        release: function (records, generator) -> the output of one step on exactly these records. Its noise must come from
            the generator, or from torch's global one, and it must leave everything as it was, so that it repeats. Whatever
            else is random (dropout, timesteps) must be the same for a record whichever others are in the batch.
        release_in_parts: function (records, generator, parts) -> the output of the same step in that many micro-batches.
        sampler: the sampler by which training chooses a step's records.
        shows_state: whether `Released.unnoised` lists everything that a step changes besides what the gradient covers.
        owned: whether the unit of privacy is an owner of several records: the last tensor of the records then has each record's
            owner, an integer, and all records of an owner are added together.
    """

    release: Release
    release_in_parts: Callable[[Records, Generator, int], Tensor | Mapping[str, Tensor] | Released] | None = None
    sampler: Sampler | None = None
    shows_state: bool = False
    owned: bool = False

    def __call__(self, records: Records, generator: Generator, parts: int = 1) -> Released:
        """Take one step. With parts=1 this calls `release`, so that what trains is what is audited."""
        if parts == 1:
            return as_released(self.release(records, generator))
        if self.release_in_parts is None:
            raise TypeError("the step has no release_in_parts")
        return as_released(self.release_in_parts(records, generator, parts))

    def replay(self, records: Records, seed: int, parts: int = 1) -> Released:
        """Take one step with all its randomness drawn from `seed`."""
        with own_randomness(seed):
            return self(records, Generator().manual_seed(seed), parts)


def as_released(value: object) -> Released:
    """Convert what a step returned to Released. Raises TypeError if it is no gradient."""
    if isinstance(value, Tensor):
        value = {"gradient": value}
    if isinstance(value, Mapping):
        value = Released(value)
    tensors = isinstance(value, Released) and all(isinstance(g, Tensor) for g in value.gradient.values())
    if not tensors or not any(g.numel() for g in value.gradient.values()):
        raise TypeError(f"a step must release a private gradient, a tensor or name -> tensor; got {value!r:.200}")
    return value


@contextmanager
def own_randomness(seed: int) -> Yielding[None]:
    """Seed torch's global generators with `seed` inside the context, and restore their states after it."""
    before = generator_states({})
    # torch.manual_seed takes milliseconds where there is no accelerator
    seed_all = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
    seed_all(seed)
    try:
        yield
    finally:
        restore_generators({}, before)


def seed_for(seed: int, name: str) -> int:
    """Derive a seed from `seed` for the use called `name`."""
    number = int.from_bytes(name.encode(), "little") % (2**61 - 1)
    return int(torch.randint(2**62, (), generator=Generator().manual_seed((seed * 1_000_003 + number) % 2**62)))


# ---- records


def check_records(records: Records, owned: bool) -> None:
    """Check that `records` has the right form. Raises TypeError, ValueError."""
    tensors = [records] if isinstance(records, Tensor) else records
    if not isinstance(tensors, Sequence) or not tensors or not all(isinstance(t, Tensor) and t.dim() for t in tensors):
        raise TypeError(
            f"records must be a tensor, or a sequence of tensors, with one record a row; got {records!r:.200}"
        )
    lengths = sorted({len(t) for t in tensors})
    if len(lengths) > 1 or lengths[0] < 2:
        raise UserError(f"records must be at least 2, and as many in each tensor; got {lengths}")
    if not owned:
        return
    if len(tensors) < 2 or tensors[-1].dim() > 1 or tensors[-1].is_floating_point() or count_units(tensors, owned) < 2:
        raise UserError(
            "the last tensor of records must say whose each record is, by an integer for each of at least 2 owners; got "
            f"{tensors[-1]!r:.200}"
        )


def units(records: Records, chosen: slice, owned: bool) -> Records:
    """Pick units of privacy in their order: records, or all records of an owner."""
    if not owned:
        return rows(records, chosen)
    owners = records[-1].tolist()
    picked = set(list(dict.fromkeys(owners))[chosen])
    return rows(records, torch.tensor([owner in picked for owner in owners], dtype=torch.bool))


def count_units(records: Records, owned: bool) -> int:
    return len(records[-1].unique()) if owned else count(records)


def each(function: Callable[..., Tensor], *records: Records) -> Records:
    """Apply `function` to every tensor of `records`, keeping their form."""
    if isinstance(records[0], Tensor):
        return function(*records)
    return tuple(function(*tensors) for tensors in zip(*records))


def rows(records: Records, chosen: slice | Sequence[int] | Tensor) -> Records:
    return each(lambda t: t[chosen], records)


def join(*batches: Records) -> Records:
    return each(lambda *tensors: torch.cat(tensors), *batches)


def count(records: Records) -> int:
    return len(records if isinstance(records, Tensor) else records[0])


def split(records: Records, parts: int) -> list[Records]:
    """Split records into at most `parts` micro-batches, none of them empty."""
    size = -(-count(records) // parts)
    return [rows(records, slice(i, i + size)) for i in range(0, count(records), size)] if size else []
