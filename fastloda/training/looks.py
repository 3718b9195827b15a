"""The looks of a trainer, its checks whether records mix: in the first step, on a data-independent schedule, at odd losses."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastloda.per_sample.refusals import is_scheduled
from fastloda.privacy.ranks import hand_back_shards
from fastloda.randomness import restored
from fastloda.training.batches import Batches
from fastloda.training.mixing import Evaluated, Signs, halves, is_due, look, places
from fastloda.training.run_state import RunState

SOME = 16  # number of units in a look that is not close


class Looks:
    """The looks of one run: its checks whether records mix (`mixing.look`), each on one micro-batch.

    Attributes:
        due: whether the next micro-batch must be looked at.
        closely: whether that look is close, as in the first step: it replaces both halves of the units, one after the other, and
            compares gradients and places too.

    Args:
        evaluate: function (units read, choices whose gradients are wanted) -> losses and gradients, under the same random
            states at every call.
    """

    def __init__(self, run: RunState, data: Batches, evaluate: Callable[[list, Sequence[Tensor]], Evaluated]):
        self._run, self._data, self._evaluate = run, data, evaluate
        self._count, self._signs = 0, Signs()
        self.due = self.closely = True

    def schedule(self) -> None:
        """Mark a look as due if the schedule has one in the next step."""
        self.due |= is_due(self._run.step + 1, self._run.secret)

    def step_taken(self) -> None:
        """Mark no look as due any more if the step has had its close look."""
        if self.closely and self._count:
            self.due = self.closely = False

    def are_surprised_by(self, losses: Sequence[Tensor]) -> bool:
        """Tell whether a step's losses, by micro-batch, are odd and not yet looked at closely; then mark a close look as due."""
        if self._signs.read(losses) and not (self.closely and self._count):
            self.due = self.closely = True
            return True
        return False

    def look(self, read: list, chosen: Tensor) -> Tensor | None:
        """Look at the units `read`, of indices `chosen`; return their losses, or None if other units than these were looked at.

        So that all looks of a run cost little, only close ones and those at steps 16, 256, 4096, ... compare gradients and
        places as well, and one that is not close takes a few of the units, unless shapes are fixed. A single unit is looked at
        beside a second one.

        Raises:
            PrivacyError: a loss depends on another unit, a record or an owner.
        """
        run, settings = self._run, self._run.settings
        self.due, self._count = self.closely, self._count + 1
        step = run.step + 1
        name = f"look {self._count} at step {step} on rank {run.world.rank}"
        alone = len(read) == 1 < settings.micro_batch_size
        thorough = self.closely or is_scheduled(step) and step.bit_length() % 4 == 1
        some = SOME < len(read) and not (self.closely or settings.fixed_shape)
        if some:
            kept = torch.randperm(len(read), generator=run.secret.generator(f"some of {name}"))[:SOME].sort().values
            read, chosen = [read[i] for i in kept.tolist()], chosen[kept]
        with restored(run.generators):
            if alone:
                chosen = torch.cat([chosen, self._others(chosen, name)])
                read = read + self._data.read(chosen[1:], run.stream)
            both = self.closely or is_scheduled(step) and not thorough
            parts = halves(len(read), both, run.secret, name)
            replaced = [(part, self._data.read(self._others(chosen[part], name), run.stream)) for part in parts]
        order = places(len(read), settings.fixed_shape, run.secret, name) if thorough else ()
        steady = not hand_back_shards(run.clipper.model)
        own = look(self._evaluate, read, replaced, order, steady=steady, gradients=thorough)
        return None if alone or some else own

    def _others(self, chosen: Tensor, name: str) -> Tensor:
        """Choose another unit for each of `chosen`, if there are two."""
        units = self._run.units
        stream = self._run.secret.generator(f"others of {chosen.tolist()}, {name}")
        return (chosen + torch.randint(1, max(2, units), chosen.shape, generator=stream)) % units
