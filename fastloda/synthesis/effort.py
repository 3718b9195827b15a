"""How much a run of `fastloda synthesize` computes: as much as fits into the user's time on this machine.

The cost of a step is measured on public images, before private ones are read; everything that follows from it, the budget and
the nominal number of records is public. The choice is stored, because the same command must find the same effort when it resumes.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import yaml

from fastloda.files import write_atomically
from fastloda.synthesis.presets import PUBLIC_STEPS, SAMPLER_STEPS, private_tuning, public_batch_size
from fastloda.synthesis.runs import RunError, make_folder
from fastloda.synthesis.settings import UNetShape
from fastloda.training.checkpoint import differences

FILE = "effort.yaml"
TITLE = "# fastloda synthesize: what fits into the given minutes on the machine where it began; it may be published\n"
PARTS = (1.0, 0.85, 0.7, 0.6, 0.5, 0.42, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1)  # shares of the full effort
FEW_IMAGES, FEW_SAMPLER_STEPS = 32, 25


@dataclass(frozen=True)
class Effort:
    """What a run computes.

    Attributes:
        width: number of channels of the U-Net's first level; None: that of its shape.
        public_steps, public_batch: number of steps of public training, and of images in a step.
        private_steps: number of steps of private training.
        sampler_steps: number of steps of the sampler.
    """

    width: int | None
    public_steps: int
    public_batch: int
    private_steps: int
    sampler_steps: int

    @property
    def steps(self) -> dict[str, int]:
        """All fields except the width, as `Recipe.fitting` takes them."""
        return {name: value for name, value in asdict(self).items() if name != "width"}

    def shape(self, unet: UNetShape) -> UNetShape:
        """Set the width of a U-Net's shape."""
        return replace(unet, width=self.width or unet.width)

    @classmethod
    def full(cls, size: int, epsilon: float) -> Self:
        """Make the full effort: images of `size` pixels would gain little from more."""
        steps = private_tuning(epsilon, size, None).steps
        return cls(None, PUBLIC_STEPS, public_batch_size(size), steps, SAMPLER_STEPS)

    def part(self, share: float) -> Self:
        """Make the effort for a share of the training: smaller public batches first, and then fewer steps."""
        least = min(FEW_IMAGES, self.public_batch)
        batch = max(least, round(share * self.public_batch))
        return replace(
            self,
            public_steps=min(self.public_steps, round(share * self.public_steps * self.public_batch / batch)),
            public_batch=batch,
            private_steps=max(1, round(share * self.private_steps)),
            sampler_steps=self.sampler_steps if share == 1 else FEW_SAMPLER_STEPS,
        )


def efforts(full: Effort, widths: Sequence[int | None], given: Mapping[str, int]) -> list[Effort]:
    """List efforts from the most to the least; numbers in `given` are the same in all.

    The full effort comes with each width, the widest first, and parts of it only with the narrowest.
    """
    fixed = dict(given) | ({"public_batch": full.public_batch} if "public_steps" in given else {})
    parts = [(width, share) for width in widths for share in (PARTS if width == widths[-1] else PARTS[:1])]
    return [replace(full.part(share), width=width, **fixed) for width, share in parts]


def largest(choices: Sequence[Effort], seconds: Callable[[Effort], float], most: float) -> Effort:
    """Return the first effort that takes at most `most` seconds, or else the last one."""
    return next((effort for effort in choices if seconds(effort) <= most), choices[-1])


def keep(out: Path, effort: Effort, asked: Mapping[str, float]) -> None:
    """Write an effort into the run's folder, with what was asked for when it was chosen."""
    make_folder(out)
    content = yaml.safe_dump({"asked": dict(asked), "effort": asdict(effort)}, sort_keys=False)
    write_atomically(out / FILE, (TITLE + content).encode())


def kept(out: Path, asked: Mapping[str, float]) -> Effort | None:
    """Read the effort with which the run in this folder began; None if there is none.

    Raises:
        RunError: the run began with other requests, or the file is damaged.
    """
    path = out / FILE
    if not path.exists():
        return None
    delete = f"rm -r {shlex.quote(str(out))}, but what was released from it still counts"
    way_out = f"Use those, another --out, or delete it ({delete})"
    try:
        content = yaml.safe_load(path.read_text())
        known, effort = dict(content["asked"]), Effort(**content["effort"])
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise RunError(f"{path} is damaged: {error!r}. {way_out}") from error
    if different := differences(known, dict(asked)):
        raise RunError(f"{out} began with other settings: {different}. {way_out}")
    return effort
