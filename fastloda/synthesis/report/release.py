"""The page to sign before anything of a run is published: what is promised to whom, and which files it applies to."""

import datetime
import logging
import math
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from fastloda import __version__
from fastloda.accounting.groups import group_epsilon
from fastloda.accounting.membership import MembershipBound
from fastloda.files import write_atomically
from fastloda.synthesis.budget import CHECKPOINT, EPSILON_CURVE, STATEMENT
from fastloda.synthesis.report.finished_run import FinishedRun
from fastloda.synthesis.report.html import Blanks, Bullets, Facts, Figure, Page, Section, Text, render
from fastloda.synthesis.report.plots import sample_grid
from fastloda.synthesis.report.tables import Table, rounded_up
from fastloda.synthesis.runs import CONFIG, DONE, SOURCE, digest
from fastloda.synthesis.samples import SAMPLES
from fastloda.synthesis.stages.layout import ADAPTER, EVALUATION, PRIVATE
from fastloda.training.releases import intent_path

logger = logging.getLogger("fastloda")

PAGE = "report.html"
GROUP_SIZES = (2, 5, 10)  # numbers of images of one person
FALSE_POSITIVE_RATES = (0.01, 0.001)
GRID_COLUMNS, GRID_ROWS = 10, 20
SIGNATURE = ("Name and function", "Date", "Signature")
LIBRARIES = ("torch", "dp-accounting", "prv-accountant")


def report(run: Path, *, evaluation: bool = True) -> dict:
    """Write report.html, a page about a finished run, to be signed before anything of the run is published.

    It says what is promised and to whom, which files may be published and which must not, and how much any attack on the
    promise can achieve at most; and it shows samples, settings and the evaluation. The accountant computes every number about
    privacy from privacy.json. The page needs no other file: a browser can show it on any screen, print it, or save it as PDF.
    It contains no private image and no path, and may be published with the rest.

    Args:
        run: folder of the run, in which `fastloda finetune` has finished. Samples and evaluations are shown if there are any.
        evaluation: whether to show the results of `fastloda evaluate`. Its accuracies are computed from the test images without
            noise: leave them out if these images are confidential.
    """
    finished = FinishedRun.read(Path(run))
    logger.info("computing what attacks can reach at most")
    page = render(_page(finished, finished.evaluations() if evaluation else []))
    write_atomically(finished.folder / PAGE, page.encode())
    return {"report": str(finished.folder / PAGE)}


def _page(run: FinishedRun, evaluations: Sequence[dict]) -> Page:
    title = f"Privacy report: {run.private_name}"
    lead = (
        f"About an adapter that was fitted to “{run.private_name}” under differential privacy, and the synthetic images drawn "
        "from it. To be read, and signed, before any of it is published."
    )
    sections = [
        Section("", list(_warning(run))),
        Section("What is promised", list(_promise(run))),
        Section("What may be published", [_may_be_published(run, evaluations)]),
        Section("What must not be published", [Facts(_confidential())]),
        Section("How strong the promise is", list(_strength(run))),
        Section("The data", [_data(run, evaluations)]),
        Section("How privacy was kept", list(_mechanism(run))),
        Section("Samples", list(_samples(run))),
        Section("Evaluation", list(_evaluation(evaluations))),
        Section("Settings", [Facts(run.settings())]),
        Section("Files that this page is about", [_digests(run)]),
        Section("Date and versions", [_versions()]),
        Section("What this page cannot know", [Bullets(list(_questions(run, evaluations))), Blanks(SIGNATURE)]),
    ]
    return Page(title, lead, [section for section in sections if section.blocks])


def _warning(run: FinishedRun) -> Iterator[Text]:
    if run.noise_is_foreseeable:
        yield Text(
            [
                f"Not for publication: the noise can be foreseen ({run.statement['randomness']}).",
                "Whoever has the seed can compute the noise and take it off, and what is promised below does not hold against "
                "them. For a run that may be published, train anew without a seed, in another folder.",
            ],
            "alarm",
        )


def _promise(run: FinishedRun) -> Iterator[Text | Bullets]:
    epsilon, delta = rounded_up(run.statement["epsilon"]), run.statement["delta"]
    right = percent(0.5 + run.bound.advantage() / 2)
    whom = "the images of a certain owner were" if run.protects_owners else "a certain image was"
    yield Text(
        [
            f"Someone who wants to know whether {whom} among “{run.private_name}”, and could only toss a coin without what is "
            f"published, is right with a chance of at most {right} with it, whatever else they know or compute.",
            f"In technical terms: the adapter, and with it everything made from it, is ({epsilon}, {delta:g})-differentially "
            f"private for adding or removing {run.unit}.",
        ],
        "notice",
    )
    yield Bullets(
        [
            f"To whom: to each of the {run.count:,} {run.counted} alike, the rare as the common.",
            "For how long: for good, against attacks that nobody knows yet, and whatever others publish.",
            "For what: for any number of synthetic images from the adapter, and for all that is computed from them.",
            "What is not promised: that nothing can be learned about people from what all the images have in common, or that no "
            "synthetic image resembles a private one by chance.",
        ]
    )


def _may_be_published(run: FinishedRun, evaluations: Sequence[dict]) -> Text | Facts:
    if run.noise_is_foreseeable:
        return Text(["Nothing that was made from the private images: see the warning at the top."])
    return Facts(_publishable(run, evaluations))


def _publishable(run: FinishedRun, evaluations: Sequence[dict]) -> dict[str, str]:
    """Say why each file that may be published may be published."""
    files = {
        f"{PRIVATE}/{ADAPTER}": "the promise covers it",
        f"{PRIVATE}/{STATEMENT}": "the promise itself, with the numbers to check it",
        f"{PRIVATE}/{EPSILON_CURVE}": "computed from public numbers",
    }
    files |= {f"{each.name}/": "synthetic images, drawn from the adapter" for each in run.sample_sets}
    files |= {str(path): "the promise covers it" for path in _chosen(run)}
    return files | {PAGE: "this page" + (", with its accuracies on the test images" if evaluations else "")}


def _confidential() -> dict[str, str]:
    """Say why everything else must not be published."""
    return {
        f"every {CHECKPOINT}": "it holds the secret from which the noise follows",
        f"{PRIVATE}/{intent_path(Path(CHECKPOINT)).name}": "it belongs to the checkpoint",
        f"every {SOURCE}": "says where images are",
        f"every {CONFIG}": "it holds the seed, if one was given, from which the noise follows",
        f"every {DONE}": "the time that a stage took depends, a little, on the images",
        EVALUATION: "the promise does not cover its accuracies",
        "the loss and the clipped share": "training shows them to the operator, without noise",
        "the private images": "and their paths, and any file that is not listed as publishable",
    }


def _chosen(run: FinishedRun) -> list[Path]:
    """List the files of the stages before fine-tuning that may be published."""
    return sorted(
        Path(choice, path.name)
        for choice in run.choices
        for path in (run.folder / choice).iterdir()
        if path.suffix in (".safetensors", ".npz", ".png") or path.name == STATEMENT
    )


def _strength(run: FinishedRun) -> Iterator[Facts | Text | Table]:
    statement, bound = run.statement, run.bound
    epsilon, delta = statement["epsilon"], statement["delta"]
    yield Facts(
        {
            "epsilon": f"{rounded_up(epsilon)} (at most; smaller is stronger: 1 is strong, 10 is common in research)",
            "delta": f"{delta:g} (the probability with which epsilon may fail to hold: 1 in {1 / delta:,.0f})",
            "mu of Gaussian DP": f"{rounded_up(bound.gdp_mu(delta))} (for attacks with both error rates above {delta:g})",
            "advantage": f"{percent(bound.advantage())} (true minus false positives, of the best attack)",
        }
    )
    alone = MembershipBound.of_promise(epsilon, delta)
    rows = []
    for rate in FALSE_POSITIVE_RATES:
        found = bound.true_positive_rate(rate)
        numbers = (found, alone.true_positive_rate(rate), found / (found + rate))
        rows.append((f"{100 * rate:g}%", *map(percent, numbers)))
    yield Table(
        "What the best attack reaches at most",
        ("False positives", "True positives", "by (ε, δ) alone", "Accusations right"),
        rows,
        notes=[
            f"An attack sees all that is published, and accuses {run.counted} of having been used. If it accuses the first share "
            "of those that were not, it finds at most the second of those that were. Epsilon and delta alone would allow it "
            "more than the accountant's whole curve does. How many of its accusations are right is computed for equally many "
            "candidates of both kinds."
        ],
    )
    if not run.protects_owners:
        if run.noise_is_correlated:
            rows = [("2 or more", "not known")]
            note = "Noise was correlated over steps. The promise above is for one image alone."
        else:
            rows = [(str(size), rounded_up(group_epsilon(run.releases, delta, size))) for size in GROUP_SIZES]
            note = f"At delta {delta:g}, for leaving out or adding any of that person's images."
            note += " The promise above is for one image."
        yield Table("For a person with several images", ("Images of one person", "Epsilon"), rows, notes=[note])


def _data(run: FinishedRun, evaluations: Sequence[dict]) -> Facts:
    facts = {
        "private images": run.private_name,
        "how many": f"{run.count:,} (a nominal number, which is public)",
        "unit of privacy": run.unit,
        "classes": run.classes,
        "public images": run.name_of_public,
    }
    if evaluations:
        facts["test images"] = ", ".join(dict.fromkeys(found["test"] for found in evaluations))
    return Facts(facts)


def _mechanism(run: FinishedRun) -> Iterator[Text | Facts | Table | Figure]:
    statement = run.statement
    yield Facts(
        {
            "mechanism": statement["mechanism"],
            "sampling": f"{statement['sampler']}: {run.counted} enter a step independently of each other",
            "adjacency": statement["adjacency"],
            "clipping": f"{statement.get('clipping', 'flat')}, to an L2 norm of {statement['max_grad_norm']:g}",
            "randomness": statement["randomness"],
            "accountant": statement["accountant"],
        }
    )
    rows = [(f"{rate:.4g}", f"{noise:.4g}", f"{steps:,}") for rate, noise, steps in run.releases]
    title = "All that this epsilon counts"
    yield Table(title, ("Sample rate", "Noise multiplier", "Steps"), rows, left=3)
    png = run.folder / PRIVATE / EPSILON_CURVE
    yield Figure("Epsilon after each number of optimizer steps", png.read_bytes())


def _samples(run: FinishedRun) -> Iterator[Figure | Text]:
    for each in run.sample_sets:
        images = each.images
        classes = images.labels.unique().tolist()
        rows = [each.class_names[c] for c in classes[:GRID_ROWS]]
        first = f", of the first {GRID_ROWS} classes" if len(classes) > GRID_ROWS else ""
        shown = f"{len(images):,} synthetic images; up to {GRID_COLUMNS} of each class are shown{first}"
        png = sample_grid(images.images, images.labels, each.class_names, columns=GRID_COLUMNS, max_rows=GRID_ROWS)
        yield Figure(f"{each.name}/: {shown}, from the top {', '.join(rows)}", png)
    if not run.sample_sets:
        yield Text(
            ["None were drawn: “fastloda sample” draws any number from the adapter, at no further cost in privacy."]
        )


def _evaluation(evaluations: Sequence[dict]) -> Iterator[Table]:
    rows = [
        (
            found["train"],
            found["test"],
            f"{found['train_images']:,}",
            f"{found['test_images']:,}",
            f"{100 * found['accuracy']:.1f}",
        )
        for found in evaluations
    ]
    if rows:
        note = (
            "A classifier was trained on the images alone, and tested on real ones. Its accuracy is a statistic of the tests, "
            "without noise: the promise does not cover those."
        )
        yield Table("", ("Trained on", "Tested on", "Images", "Tests", "Accuracy %"), rows, left=2, notes=[note])


def _digests(run: FinishedRun) -> Facts:
    paths = [Path(PRIVATE, ADAPTER), Path(PRIVATE, STATEMENT), *(Path(each.name, SAMPLES) for each in run.sample_sets)]
    paths += _chosen(run)
    return Facts({str(path): digest(run.folder / path) for path in paths}, "SHA-256 of each")


def _questions(run: FinishedRun, evaluations: Sequence[dict]) -> Iterator[str]:
    if run.protects_owners:
        yield "Was each image assigned to the person whom it shows or belongs to, and each person counted once?"
    else:
        yield "Does each person have one image only? A person with several is promised less: each of them counts."
    yield f"May it be known that there are {run.count:,} {run.counted}, and which classes they have?"
    yield "Were the public images really public, and none of the private ones among them?"
    yield (
        "Was anything else released about the same images: another run, a statistic, settings chosen by how they did on them? "
        "Then more is spent than stands here; “fastloda account --composition” adds up several runs."
    )
    if evaluations:
        yield "May the accuracies on the test images be published? Without them: “fastloda report --evaluation false”."
    yield "Are the names of data and classes on this page fit to be published?"


def _versions() -> Facts:
    today = datetime.date.today().isoformat()
    versions = {"fastloda": __version__, "python": platform.python_version()} | {
        name: version(name) for name in LIBRARIES
    }
    return Facts(
        {"date of this page": today, "versions": ", ".join(f"{name} {number}" for name, number in versions.items())}
    )


def percent(share: float) -> str:
    """Write a share, 0 to 1, in percent, rounded up so that an upper bound remains one; two decimals below 10%, else one."""
    digits = 1 if share >= 0.1 else 2
    return f"{min(100.0, math.ceil(100 * share * 10**digits - 1e-6) / 10**digits):.{digits}f}%"
