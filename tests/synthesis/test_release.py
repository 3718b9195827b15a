"""`fastloda report`: the promise first, right numbers, no path and no private image, and a refusal of unfinished runs."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from pages import check_page, source_pixels, without_images

from fastloda.accounting.groups import group_epsilon
from fastloda.accounting.membership import MembershipBound
from fastloda.errors import UserError
from fastloda.synthesis import stages
from fastloda.synthesis.account import read_statement
from fastloda.synthesis.budget import CYCLIC, Privacy
from fastloda.synthesis.cli import main
from fastloda.synthesis.data import digits_split
from fastloda.synthesis.diffusion.pretrain import PublicTraining
from fastloda.synthesis.methods import PublicChoice, Reach
from fastloda.synthesis.report.release import percent, report
from fastloda.synthesis.report.tables import rounded_up
from fastloda.synthesis.runs import RunError
from fastloda.synthesis.settings import Classifier, FineTuning, UNetShape
from fastloda.synthesis.stages import preview

UNET = UNetShape(width=8, norm_groups=4)
PRIVACY = Privacy(target_epsilon=8.0, delta=1e-5, epochs=0.3, batch_size=48)
SEED = 987_654_321
QUIET = {"progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Make two runs on files with a telling name: one as it should be, one with a fixed seed and a choice before it."""
    folder = tmp_path_factory.mktemp("clinic")
    private, test = (folder / f"{part}-of-john-doe.npz" for part in ("images", "tests"))
    for path, images in zip((private, test), digits_split(), strict=True):
        images.save_npz(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview, "PREVIEW_COLUMNS", 1)
        public = PublicTraining(steps=2, batch_size=8, warmup=1, seed=0)
        made = {name: folder / name for name in ("run", "seeded")}
        stages.pretrain(made["run"], data="font-digits", count=64, unet=UNET, training=public, **QUIET)
        shutil.copytree(made["run"], made["seeded"])
        choice = PublicChoice(20.0, features=20, drawn=16, reach=Reach(), training=public)
        stages.choose(
            made["seeded"],
            delta=1e-5,
            choice=choice,
            data=str(private),
            public="font-digits",
            count=80,
            seed=SEED,
            **QUIET,
        )
        for name, seed in (("run", None), ("seeded", SEED)):
            stages.finetune(made[name], PRIVACY, data=str(private), training=FineTuning(seed=seed), **QUIET)
            stages.sample(made[name], count=25, steps=2, **QUIET)
        stages.evaluate(made["run"], test=str(test), classifier=Classifier(steps=2, width=8), **QUIET)
    return made


@pytest.fixture
def run(runs, tmp_path) -> Path:
    """Copy the run that is as it should be, so that a test can change it."""
    return Path(shutil.copytree(runs["run"], tmp_path / "run", ignore=shutil.ignore_patterns("report.html")))


def page_of(run: Path, **options) -> str:
    assert report(run, **options) == {"report": str(run / "report.html")}
    return (run / "report.html").read_text()


def statement_of(run: Path) -> dict:
    return json.loads((run / "private" / "privacy.json").read_text())


def change(path: Path, **values) -> None:
    """Change values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_promise_comes_first_with_the_accountants_numbers(run):
    html, statement = page_of(run), statement_of(run)
    release = (statement["sample_rate"], statement["noise_multiplier"], statement["steps"])
    bound = MembershipBound.of_releases([release], 1e-5)
    alone = MembershipBound.of_promise(statement["epsilon"], 1e-5)
    epsilon = rounded_up(statement["epsilon"])
    promise = html.index("What is promised")
    assert promise < html.index(f"({epsilon}, 1e-05)-differentially private for adding or removing one image.")
    assert (
        promise < html.index("What may be published") < html.index("How strong the promise is") < html.index("The data")
    )
    shown = [percent(0.5 + bound.advantage() / 2), rounded_up(bound.gdp_mu(1e-5)), percent(bound.advantage())]
    shown += [percent(each.true_positive_rate(rate)) for each in (bound, alone) for rate in (0.01, 0.001)]
    shown += [
        "1,437 images",
        "a certain image was among “private images”",
        "font-digits",
        "seeded by the operating system",
    ]
    for text in [
        *shown,
        "privacy.target_epsilon",
        "samples.guidance",
        "private/adapter.safetensors",
        "private/checkpoint.pt.spent",
    ]:
        assert text in html
    table = html.split("For a person with several images")[1]
    for size in (2, 5, 10):
        assert f'<td>{size}</td>\n<td class="number">{rounded_up(group_epsilon([release], 1e-5, size))}</td>' in table
    assert 'class="alarm"' not in html


def test_nothing_is_promised_to_a_person_with_several_images_if_noise_is_correlated(run):
    change(run / "private" / "privacy.json", bands=4)
    table = page_of(run).split("For a person with several images")[1].split("</table>")[0]
    assert "2 or more" in table and "not known" in table and "<td>5</td>" not in table


def test_a_statement_of_correlated_noise_is_read(run):
    change(run / "private" / "privacy.json", bands=4, sampler=CYCLIC.format(4))
    assert read_statement(run)["bands"] == 4
    change(run / "private" / "privacy.json", bands=8)
    with pytest.raises(UserError, match="no privacy statement"):
        read_statement(run)


def test_the_page_is_self_contained_and_names_no_path_and_no_seed(runs):
    for run in runs.values():
        html = page_of(run)
        curve, grid = check_page(html)
        assert "0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in grid["alt"] and source_pixels(curve).size
        for hidden in (str(run), run.parent.name, "john-doe", ".npz:", "/tmp", str(Path.home()), str(SEED)):
            assert hidden not in without_images(html)


def test_noise_that_can_be_foreseen_is_said_first_in_red(runs):
    html = page_of(runs["seeded"])
    assert html.index('class="alarm"') < html.index("Not for publication") < html.index("What is promised")
    assert "fixed seed: an experiment" in html and "Nothing that was made from the private images" in html
    assert "the promise covers it" not in html


def test_a_choice_is_counted_and_its_files_are_listed(runs, tmp_path):
    run = Path(shutil.copytree(runs["seeded"], tmp_path / "run"))
    statement, path = statement_of(run), run / "private" / "privacy.json"
    change(path, seed_was_fixed=False)
    assert 'class="alarm"' in page_of(run)  # each release has its own statement of how its noise was drawn
    change(path, releases=[release | {"seed_was_fixed": False} for release in statement["releases"]])
    html = page_of(run)
    assert 'class="alarm"' not in html
    assert len(statement["earlier"]) == 1 and f"{statement['earlier'][0][1]:.4g}" in html
    assert html.count("chosen/sums.safetensors") == 2  # once as a file to publish, once with its hash
    earlier = [[*statement["earlier"][0][:2], 200]]
    change(run / "chosen" / "privacy.json", steps=200)
    with pytest.raises(RunError, match="does not count what chosen/ has released"):
        report(run)
    change(path, earlier=earlier)
    with pytest.raises(ValueError, match="it was changed after training"):
        report(run)


def test_a_statement_that_promises_too_much_is_refused(run):
    statement = statement_of(run)
    change(run / "private" / "privacy.json", epsilon=statement["epsilon"] * 0.99)
    with pytest.raises(ValueError, match=rf"costs {statement['epsilon']:.4g} at delta 1e-05: it was changed"):
        report(run)
    assert not (run / "report.html").exists()


def test_the_unit_and_the_name_of_the_data_are_those_of_the_statement(run):
    unit = "one owner of images, at most 3 of which are used in a step"
    assert "For a person with several images" in page_of(run)
    change(
        run / "private" / "privacy.json", unit=unit, owners=300, name="Blood cells <2019>", classes=["mast", "T & B"]
    )
    html = page_of(run)
    assert (
        f"for adding or removing {unit}." in html
        and "to each of the 300 owners of images" in html
        and "mast, T &amp; B" in html
    )
    assert (
        "the images of a certain owner were among “Blood cells &lt;2019&gt;”" in html
        and "person with several" not in html
        and "each person counted once" in html
    )


def test_the_evaluation_may_be_left_out(run):
    accuracy = json.loads((run / "evaluation.json").read_text())["samples"]["accuracy"]
    assert f"{100 * accuracy:.1f}" in page_of(run).split("<h2>Evaluation")[1].split("<h2>")[0]
    html = page_of(run, evaluation=False)
    assert "<h2>Evaluation" not in html and "accuracies on the test" not in html


def test_a_run_without_samples_says_how_to_draw_them(run):
    shutil.rmtree(run / "samples")
    (run / "evaluation.json").unlink()
    assert "“fastloda sample” draws any number" in page_of(run)


def _unfinished(name: str):
    return lambda run: (run / name / "done.json").unlink()


def _with_config(text: str, name: str):
    def begin(run):
        (run / name).mkdir()
        (run / name / "config.yaml").write_text(text)

    return begin


CHANGES = {
    "gone": (shutil.rmtree, "no run .*: --run takes the folder"),
    "only public": (
        lambda run: shutil.rmtree(run / "private"),
        "not fine-tuned: `fastloda finetune` makes its adapter",
    ),
    "training": (_unfinished("private"), "not finished: the same `fastloda finetune` continues"),
    "choosing": (_with_config("seed: 1", "chosen"), "the same `fastloda choose` continues it"),
    "sampling": (_unfinished("samples"), "the same `fastloda sample` continues it"),
    "another adapter": (
        lambda run: (run / "private/adapter.safetensors").write_bytes(b"other"),
        "from another adapter",
    ),
    "other samples": (
        lambda run: (run / "samples/samples.npz").write_bytes(b"other"),
        "`fastloda evaluate` tests these",
    ),
    "damaged": (lambda run: (run / "private/config.yaml").write_text("- 1"), "damaged"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_finished_or_does_not_belong_together_is_refused(run, name, capsys):
    alter, message = CHANGES[name]
    alter(run)
    with pytest.raises(RunError, match=message):
        report(run)
    assert not (run / "report.html").exists()
    assert main(["report", "--run", str(run)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fastloda report: error: ")


def test_the_command_writes_the_page_and_its_help_says_what_for(run, capsys):
    assert main(["report", "--run", str(run), "--evaluation", "false"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == {"report": str(run / "report.html")}
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "to be signed before anything of the run is published" in text and "--evaluation" in text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0.00%"), (0.01, "1.00%"), (0.0100001, "1.01%"), (0.5, "50.0%"), (0.50001, "50.1%"), (1, "100.0%")],
)
def test_a_shown_share_is_still_an_upper_bound(share, text):
    assert percent(share) == text
