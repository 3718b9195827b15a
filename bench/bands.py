"""The cost of correlated noise: private steps with 32 bands and with one, interleaved. `python bench/bands.py [rounds]`."""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from adapters import use_loda_layers  # noqa: E402
from cases import Case  # noqa: E402
from measure import Race, ratio  # noqa: E402

from fastloda import GhostClipper  # noqa: E402

CASES = (Case("digits_unet", batch=64), Case("digits_unet", batch=64, rank=None))
BANDS = (1, 32)


class Steps:
    """The private steps of a case, without an optimizer; `noise` alone is the step of an empty batch."""

    def __init__(self, case: Case, bands: int):
        self.case, self.model, self.batch = case, use_loda_layers(case.build()), case.inputs()
        self.clipper = GhostClipper(self.model, 1.0, bands=bands)
        for _ in range(bands):
            self.noise()

    def __call__(self) -> None:
        self.clipper.accumulate(self.case.losses(self.model, self.batch))
        self.noise()

    def noise(self) -> None:
        self.clipper.privatize(1.0, self.case.batch)

    def held(self) -> int:
        """Count the bytes of past noise that are kept between steps."""
        past = self.clipper.noise.state(self.clipper.parameters)
        return sum(noise.nbytes for each in past for noise in each.values())


def main(rounds: int) -> None:
    """Print for each case the numbers trained, the bytes held, and the times of a step and of its noise alone."""
    for case in CASES:
        steps = {bands: Steps(case, bands) for bands in BANDS}
        race = Race({str(bands): run for bands, run in steps.items()})
        alone = Race({str(bands): run.noise for bands, run in steps.items()})
        for _ in range(rounds):
            race.round()
            alone.round()
        one, many = (str(bands) for bands in BANDS)
        numbers = sum(p.numel() for p in steps[1].clipper.parameters.values())
        print(f"{case.name}: {numbers} numbers train, {steps[BANDS[1]].held() / 1e6:.2f} MB held with {many} bands")
        print(f"  step {ratio(race.times[many], race.times[one]):.3f} of that with independent noise", end="")
        for what, times in (("step", race.times), ("noise", alone.times)):
            print(
                f"; {what} {' and '.join(f'{statistics.median(times[b]) * 1e3:.2f}' for b in (one, many))} ms", end=""
            )
        print()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
