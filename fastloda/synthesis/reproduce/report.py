"""The report of a table as JSON, Markdown and a page: measured values in the paper's order, beside the published ones."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev

from fastloda.accounting.compose import compose_epsilon
from fastloda.files import write_atomically
from fastloda.synthesis.methods import Method
from fastloda.synthesis.report.html import Facts, Figure, Page, Section, Text, render
from fastloda.synthesis.report.plots import accuracy_curves, sample_grid
from fastloda.synthesis.report.tables import Table, rounded_up, times_table
from fastloda.synthesis.runs import write_json

from .cells import GRID, Cell, picture_file
from .published import Accuracies
from .recipe import Recipe

MIB = 1 << 20
ABSENT = "–"


@dataclass(frozen=True)
class Findings:
    """The results of a table: `results` maps each cell to its `Cell.result`; `environment` lists the machine and the versions."""

    recipe: Recipe
    results: Mapping[Cell, dict]
    run: Path
    environment: Mapping[str, object]

    def write(self) -> None:
        """Write results.json, results.md with its pictures, and report.html to the run's folder."""
        write_json(self.run / "results.json", self.to_dict())
        for figure in self._pictures():
            write_atomically(self.run / self._file(figure), figure.png)
        write_atomically(self.run / "results.md", self.to_markdown().encode())
        write_atomically(self.run / "report.html", render(self._page()).encode())

    @cached_property
    def accuracy_table(self) -> Table:
        """Percent accuracy, methods by epsilon: mean and standard deviation over the seeds, and published values."""
        budgets = list(map(_budget, self.recipe.epsilons))
        cells = lambda method: [self._cell(method, epsilon) for epsilon in self.recipe.epsilons]  # noqa: E731
        rows = [[method.name, method.trained_on, *cells(method)] for method in self.recipe.methods]
        judges = ", ".join(self.recipe.classifiers)
        notes = [f"Classifiers: {judges}; the mean over them and over {self._seeds}, ± over seeds."]
        if self.recipe.published:
            notes.append("In brackets: what the paper published, on its own machines; quoted, not measured.")
        return Table(self.recipe.title, ["Method", "Classifier trained on", *budgets], rows, left=2, notes=notes)

    @cached_property
    def score_table(self) -> Table:
        """The table of image scores: the FID at each epsilon, the others at the largest, of the methods that draw images."""
        budgets, largest = self.recipe.epsilons, max(self.recipe.epsilons)
        others = {"KID": ".4f", "precision": ".2f", "recall": ".2f"}
        columns = ["Method", *(f"FID, {_budget(epsilon)}" for epsilon in budgets), *others]
        drawing = [
            method for method in self.recipe.methods if any(self._scores(method, epsilon) for epsilon in budgets)
        ]
        rows = [
            [
                method.name,
                *(_mean_of("fid", self._scores(method, epsilon), ".1f") for epsilon in budgets),
                *(_mean_of(name.lower(), self._scores(method, largest), spec) for name, spec in others.items()),
            ]
            for method in drawing
        ]
        return Table("Images, against the real test images", columns, rows, notes=self._score_notes())

    def _other_tables(self) -> list[Table]:
        return [table for table in (self.score_table, self.loss_table, self.cost_table) if table.rows]

    @cached_property
    def loss_table(self) -> Table:
        """The table of the diffusion models' losses on the test images: methods by epsilon, mean and deviation over the seeds."""
        budgets = self.recipe.epsilons
        rows = [
            [method.name, *(_spread(self._losses(method, epsilon), ".4f") for epsilon in budgets)]
            for method in self.recipe.methods
            if any(self._losses(method, epsilon) for epsilon in budgets)
        ]
        notes = [
            "A tenth of the labels are dropped, as in training. These, noise levels and noise are the same for all: differences "
            "mean more than those of accuracies."
        ]
        return Table("Diffusion loss on the real test images", ["Method", *map(_budget, budgets)], rows, notes=notes)

    def _losses(self, method: Method, epsilon: float) -> list[float]:
        return [result["loss"] for result in self.of(method, epsilon) if result["loss"] is not None]

    @cached_property
    def cost_table(self) -> Table:
        """The table of time and memory per private step, and of the time per stage."""
        columns = [
            "Method",
            "trained numbers",
            "step, ms / record",
            "step's peak, MiB",
            "fit, s",
            "sample, s",
            "judge, s",
        ]
        hours = sum(sum(result["seconds"].values()) for result in self.results.values()) / 3600
        notes = [f"All {len(self.results)} cells: {hours:.1f} hours, if they were computed one after the other."]
        return Table("Cost", columns, [self._cost_row(method) for method in self.recipe.methods], notes=notes)

    def to_dict(self) -> dict:
        cells = [
            {"method": cell.method.name, "epsilon": cell.epsilon, "seed": cell.seed, **result}
            for cell, result in self.results.items()
        ]
        published = [
            {"method": method, "epsilon": epsilon, "accuracy_percent": value}
            for (method, epsilon), value in self.recipe.published.items()
        ]
        return {
            "table": self.recipe.name,
            "measured": cells,
            "published": published,
            "settings": {method.name: repr(method) for method in self.recipe.methods},
            "how_chosen": dict(self.recipe.how_chosen),
            "epsilon_of_all_releases_together": self.all_together,
            "environment": dict(self.environment),
        }

    def to_markdown(self) -> str:
        tables = [self.accuracy_table, *self._other_tables()]
        parts = [f"# {self.recipe.title}", self.recipe.lead]
        parts += [
            f"## {table.title}\n\n{table.to_markdown()}" if i else table.to_markdown() for i, table in enumerate(tables)
        ]
        chart, *samples = [
            (figure.caption, f"![{figure.caption}]({self._file(figure)})") for figure in self._pictures()
        ]
        parts += [f"## {chart[0]}\n\n{chart[1]}", "## Samples", *_gallery(samples)]
        chosen = "\n".join(f"- {name}: {how}" for name, how in self.recipe.how_chosen.items())
        parts += ["## Privacy", *self._statement(), "## How hyper-parameters were chosen", chosen]
        parts += [f"Measured on {_listed(self.environment)}.", *self._elsewhere()]
        return "\n\n".join(parts) + "\n"

    def _page(self) -> Page:
        spent = [Facts(facts, name, folded=True) for name, facts in self._spent_facts().items()]
        seconds = {cell.name: sum(result["seconds"].values()) for cell, result in self.results.items()}
        return Page(
            self.recipe.title,
            self.recipe.lead,
            [
                Section("", [replace(self.accuracy_table, title=""), self._chart, *self._other_tables()]),
                Section("Images", list(self._grids())),
                Section("Privacy", [Text(self._statement(), "notice"), *spent]),
                Section("How hyper-parameters were chosen", [Facts(self.recipe.how_chosen)]),
                Section("Time", [times_table(seconds)]),
                Section("Machine and versions", [Facts(self.environment), Text(self._elsewhere())]),
            ],
        )

    @property
    def _seeds(self) -> str:
        """The number of seeds, as words; rows may have different numbers of them."""
        counts = {len(self.of(cell.method, cell.epsilon or self.recipe.epsilons[0])) for cell in self.results}
        few, many = min(counts, default=0), max(counts, default=0)
        return f"{many} seed{'s' * (many != 1)}" if few == many else f"{few} to {many} seeds"

    def of(self, method: Method, epsilon: float) -> list[dict]:
        """List a method's results at a budget, one per seed; a method without a budget has the same results at each."""
        wanted = epsilon if method.has_budget else None
        return [result for cell, result in self.results.items() if (cell.method, cell.epsilon) == (method, wanted)]

    def accuracies(self, method: Method, epsilon: float) -> list[float]:
        """Compute a method's accuracies in percent, one per seed, each the mean over the classifiers."""
        return [100 * fmean(result["accuracy"].values()) for result in self.of(method, epsilon)]

    def _cell(self, method: Method, epsilon: float) -> str:
        values = self.accuracies(method, epsilon)
        text = _spread(values, ".1f")
        quoted = _published(self.recipe.published, method, epsilon)
        return text if quoted is None else f"{text} ({quoted:.1f})"

    def _scores(self, method: Method, epsilon: float) -> list[dict]:
        return [result["scores"] for result in self.of(method, epsilon) if result["scores"]]

    def _score_notes(self) -> list[str]:
        names = dict.fromkeys(result["scores"]["features"] for result in self.results.values() if result["scores"])
        if not names:
            return []
        used = [method.name for method in self.recipe.methods if method.name in ("DP-MEPF", "Private Evolution")]
        favoured = (
            f" {' and '.join(used)} used features of a network like it, which favours the scores." if used else ""
        )
        return [
            f"KID, precision and recall at epsilon {max(self.recipe.epsilons):g}. Features: {', '.join(names)}. Scores on other "
            f"features can't be compared with these.{favoured}"
        ]

    def _cost_row(self, method: Method) -> list[str]:
        results = [result for cell, result in self.results.items() if cell.method == method]
        steps = [result["step"] for result in results if result["step"]]
        parts = ("fit", "sample", "judge")
        times = [[result["seconds"][part] for result in results if part in result["seconds"]] for part in parts]
        seconds = [f"{fmean(values):.0f}" if values else ABSENT for values in times]
        if not steps:
            return [method.name, *[ABSENT] * 3, *seconds]
        per_record = [1e3 * step["seconds"] / step["samples"] for step in steps]
        return [
            method.name,
            _range([step["trained"] for step in steps], ","),
            _range(per_record, ".2f"),
            f"{max(step['peak_bytes'] for step in steps) / MIB:,.0f}",
            *seconds,
        ]

    @cached_property
    def all_together(self) -> float | None:
        """The epsilon of all private cells together, as if all of them were released; None if there is none."""
        spent = [result["spent"] for result in self.results.values() if result["spent"]["epsilon"]]
        releases = [release for facts in spent for release in facts["releases"]]
        runs = [(r["sample_rate"], r["noise_multiplier"], r["steps"]) for r in releases]
        return compose_epsilon(runs, self.recipe.delta) if runs else None

    def _statement(self) -> list[str]:
        delta, together = self.recipe.delta, self.all_together
        lines = [
            f"A row's epsilon, at delta = {delta:g}, covers all that its method released about the private images, for adding or "
            "removing one of them: gradients, feature sums, counts, whatever it was, composed by the accountant.",
            "Seeds are fixed, so that cells can be repeated: experiments, not private releases. The rows without privacy, and "
            "the test accuracies and image scores, are not covered.",
        ]
        if together:
            everything = f"({rounded_up(together)}, {delta:g})-private"
            lines.append(f"Were all private cells of this page released, they would be {everything} together.")
        if self.recipe.blind:
            lines.append("No setting was chosen by how well it does on the private or the test images.")
        return lines

    def _elsewhere(self) -> list[str]:
        """Describe the machines on which cells were measured that were taken over from other runs."""
        here = _listed(self.environment)
        found = Counter(_listed(result["environment"]) for result in self.results.values() if "environment" in result)
        return [f"{count} of the cells: on {there}." for there, count in found.items() if there != here]

    @cached_property
    def _chart(self) -> Figure:
        return Figure("Accuracy on real test images by epsilon", accuracy_curves(self._curves(), self._levels()))

    def _pictures(self) -> list[Figure]:
        """Collect the plot of accuracies, and samples of each method at the table's largest epsilon."""
        largest = {None, max(self.recipe.epsilons)}
        return [self._chart, *(figure for cell, figure in self._samples() if cell.epsilon in largest)]

    def _samples(self) -> Iterator[tuple[Cell, Figure]]:
        """Yield the cells of the first seed that draw images, each with a figure of its samples."""
        for cell in self.results:
            grid = cell.folder(self.run) / GRID
            if cell.seed == 0 and grid.exists():
                yield cell, Figure(cell.caption, grid.read_bytes())

    def _file(self, figure: Figure) -> str:
        return picture_file(self.recipe.name, figure.caption)

    def _curves(self) -> dict[str, list[tuple[float, list[float]]]]:
        private = [method for method in self.recipe.methods if method.has_budget]
        return {m.name: [(e, v) for e in self.recipe.epsilons if (v := self.accuracies(m, e))] for m in private}

    def _levels(self) -> dict[str, float]:
        free = [method for method in self.recipe.methods if not method.has_budget]
        return {m.name: fmean(values) for m in free if (values := self.accuracies(m, self.recipe.epsilons[0]))}

    def _grids(self) -> Iterator[Figure]:
        public = self.recipe.public()[:400]
        yield Figure("Public images", sample_grid(public.images, public.labels))
        yield from (figure for _, figure in self._samples())

    def _spent_facts(self) -> dict[str, dict]:
        spent = {cell.name: result["spent"] for cell, result in self.results.items() if result["spent"]["epsilon"]}
        return {
            name: {"epsilon": facts["epsilon"]} | {r["what"]: _mechanism(r) for r in facts["releases"]}
            for name, facts in spent.items()
        }


def _listed(environment: Mapping[str, object]) -> str:
    return "; ".join(f"{name} {value}" for name, value in environment.items())


def _budget(epsilon: float) -> str:
    return f"epsilon {epsilon:g}"


def _spread(values: Sequence[float], spec: str) -> str:
    """Format the mean of values, with their standard deviation if there are several."""
    if not values:
        return ABSENT
    return format(fmean(values), spec) + (f" ± {format(stdev(values), spec)}" if len(values) > 1 else "")


def _range(values: Sequence[float], spec: str) -> str:
    """Format values that belong together: one number, or the least and the largest one if they differ."""
    least, largest = (format(value, spec) for value in (min(values), max(values)))
    return least if least == largest else f"{least}–{largest}"


def _mean_of(name: str, scores: Sequence[dict], spec: str) -> str:
    return format(fmean(score[name] for score in scores), spec) if scores else ABSENT


def _gallery(pictures: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Lay out pictures, each a caption and its Markdown, three side by side."""
    for start in range(0, len(pictures), 3):
        captions, images = zip(*pictures[start : start + 3])
        yield Table("", captions, [images], left=3).to_markdown()


def _mechanism(release: dict) -> str:
    noise = f"noise multiplier {release['noise_multiplier']:.4g}"
    return f"{noise}, sample rate {release['sample_rate']:.4g}, {release['steps']} times"


def _published(accuracies: Accuracies, method: Method, epsilon: float) -> float | None:
    return accuracies.get((method.name, epsilon if method.has_budget else None))
