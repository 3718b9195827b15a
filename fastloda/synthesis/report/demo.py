"""The outcome of the demo as JSON, Markdown and a page."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fastloda.accounting.compose import compose_epsilon
from fastloda.files import write_atomically
from fastloda.synthesis.account import releases
from fastloda.synthesis.data import font_digits
from fastloda.synthesis.report.html import Facts, Figure, Page, Section, Text, render
from fastloda.synthesis.report.plots import accuracy_plot, sample_grid
from fastloda.synthesis.report.tables import Result, result_table, rounded_up, settings_table, times_table
from fastloda.synthesis.runs import write_json

TITLE = "Private synthetic digits"
PUBLIC_ONLY, CHOSEN_ONLY = "Public only", "Public, chosen privately"
LODA, DPSGD, NO_PRIVACY = "DP-LoDA (ours)", "DP-SGD", "No privacy"


@dataclass(frozen=True)
class Outcome:
    """The results of a demo.

    Attributes:
        accuracies: (method, target epsilon) -> one accuracy per seed; epsilon is 0 for the public model, infinity without
            privacy.
        statements: (method, target epsilon, seed) -> the private run's privacy.json.
        seconds: stage -> time that its work took.
        settings: name -> value of each hyper-parameter.
        reasons: name -> how the hyper-parameter was chosen.
        environment: machine and versions.
        grids, curves: caption -> PNG file of seed 0.
        form: a sentence on how much was computed, and which options compute more or less.
    """

    accuracies: Mapping[tuple[str, float], list[float]]
    statements: Mapping[tuple[str, float, int], dict]
    seconds: Mapping[str, float]
    settings: Mapping[str, object]
    reasons: Mapping[str, str]
    environment: Mapping[str, object]
    grids: Mapping[str, Path]
    curves: Mapping[str, Path]
    form: str

    def write(self, folder: Path) -> None:
        """Write results.json, results.md and report.html into `folder`."""
        write_json(folder / "results.json", self.to_dict())
        write_atomically(folder / "results.md", self.to_markdown().encode())
        write_atomically(folder / "report.html", render(self.to_page()).encode())

    @cached_property
    def results(self) -> list[Result]:
        """The rows of the table, from no private data to no privacy."""
        return list(self._rows())

    def _rows(self) -> Iterator[Result]:
        yield self._row(PUBLIC_ONLY, 0.0, "samples of the public model")
        for epsilon in sorted({epsilon for _, epsilon, _ in self.statements}):
            yield self._row(CHOSEN_ONLY, epsilon, "samples of the public model trained on chosen digits")
            yield self._row(LODA, epsilon, "samples of the private model that adapts it")
            yield self._row(DPSGD, epsilon, "the private digits, by DP-SGD")
        yield self._row(NO_PRIVACY, float("inf"), "the private digits")

    def _row(self, method: str, target: float, trained_on: str) -> Result:
        spent = [s["epsilon"] for key, s in self.statements.items() if key[:2] == (method, target)]
        return Result(method, max(spent, default=target), trained_on, tuple(self.accuracies[method, target]))

    @cached_property
    def runs(self) -> list[dict]:
        """The statements of the private runs, without those of choices, which the runs after them count too."""
        return [statement for (method, _, _), statement in self.statements.items() if method != CHOSEN_ONLY]

    @cached_property
    def all_together(self) -> float:
        """The epsilon of all private runs together, as if all of them were released."""
        return compose_epsilon([release for run in self.runs for release in releases(run)], self.settings["delta"])

    def to_dict(self) -> dict:
        """Convert to JSON values; epsilon is null for runs without privacy."""
        rows = [
            {
                "method": result.method,
                "epsilon": None if result.epsilon == float("inf") else result.epsilon,
                "trained_on": result.trained_on,
                "accuracy_mean": result.mean,
                "accuracy_std": result.std,
                "accuracy_by_seed": list(result.accuracies),
            }
            for result in self.results
        ]
        return {
            "results": rows,
            "form": self.form,
            "delta": self.settings["delta"],
            "randomness": self._randomness(),
            "epsilon_of_all_private_runs_together": self.all_together,
            "privacy": dict(self._named_statements()),
            "settings": self.settings,
            "seconds": self.seconds,
            "environment": self.environment,
        }

    def to_markdown(self) -> str:
        return (
            f"# {TITLE}\n\n{self._lead()}\n\n{result_table(self.results).to_markdown()}\n"
            + "\n\n".join(self._statement())
            + "\n"
        )

    def to_page(self) -> Page:
        fonts = font_digits(400, seed=0)  # the only real images that are shown are public ones
        shown = Figure("Public training images: digits drawn from fonts", sample_grid(fonts.images, fonts.labels))
        grids = [Figure(caption, path.read_bytes()) for caption, path in self.grids.items()]
        curves = [Figure(caption, path.read_bytes()) for caption, path in self.curves.items()]
        spent = [Facts(statement, run, folded=True) for run, statement in self._named_statements()]
        accuracies = Figure("Accuracy on real digits; dots are single seeds", accuracy_plot(self.results))
        settings = {name: (value, self.reasons[name]) for name, value in self.settings.items()}
        return Page(
            TITLE,
            self._lead(),
            [
                Section("", [result_table(self.results), accuracies]),
                Section("Images", [shown, *grids]),
                Section("Privacy", [Text(self._statement(), "notice"), *curves, *spent]),
                Section("Hyper-parameters, and how each was chosen", [settings_table(settings)]),
                Section("Time", [times_table(self.seconds)]),
                Section("Machine and versions", [Facts(self.environment)]),
            ],
        )

    def _named_statements(self) -> Iterator[tuple[str, dict]]:
        for (method, epsilon, seed), statement in self.statements.items():
            yield f"{method}, target epsilon {epsilon:g}, seed {seed}", statement

    def _randomness(self) -> str:
        return "; ".join(dict.fromkeys(statement["randomness"] for statement in self.statements.values()))

    def _lead(self) -> str:
        images, records = self.settings["public_images"], next(iter(self.statements.values()))["records"]
        return (
            f"A diffusion model of {images:,} digits drawn from fonts was trained further on those that are like "
            f"{records:,} real handwritten ones, as far as one noisy statistic tells, and then fitted to these by low-rank "
            "adapters, under differential privacy; each budget covers both. A classifier was trained on "
            f"{self.settings['synthetic_images']:,} synthetic digits alone, and tested on 360 real ones that no "
            f"training saw. {self.form}"
        )

    def _statement(self) -> list[str]:
        delta = self.settings["delta"]
        return [
            f"Each DP row is (epsilon, {delta:g})-differentially private for adding or removing one record: gradients "
            "are clipped record by record, records sampled by Poisson, noise is added once a step, and epsilon is an "
            "upper bound by numerical accountants. It covers the choice of public digits, the adapters and everything made "
            "from them: samples, and classifiers trained on those.",
            f"Randomness: {self._randomness()}. The digits are a public data set that stands for private data; none is shown.",
            "Not covered: the row without privacy, and the test accuracies, which are statistics of the 360 test "
            "digits. The table's numbers come from separate runs on the same records; were all "
            f"{len(self.runs)} private runs released, they would be ({rounded_up(self.all_together)}, {delta:g})-"
            "private together.",
            "No setting was chosen by how well it does on the private or the test digits; the report says how each was chosen. "
            "That the public digits are drawn wider than one hand was decided after a look at the picture of the data set in "
            "scikit-learn's documentation; that public digits are chosen by a noisy statistic and moved, the number of synthetic "
            "digits, and that MNIST's stood in for the private ones in the last trials, after accuracies of earlier versions on "
            "the real digits were known.",
        ]
