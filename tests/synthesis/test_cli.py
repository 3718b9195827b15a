"""The command: help, configuration, exit codes, and one line for each mistake."""

import errno
import functools
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from fastloda import files
from fastloda.synthesis import account, cli, demo
from fastloda.synthesis.cli import main
from fastloda.synthesis.parser import build_parser
from fastloda.synthesis.plan import Cost
from fastloda.synthesis.stages import finetuning, preview

TINY_UNET = ["--unet.width", "8", "--unet.norm_groups", "4"]
PRETRAIN = [
    "--data",
    "font-digits",
    "--count",
    "40",
    "--training.steps",
    "2",
    "--training.batch_size",
    "8",
    "--training.warmup",
    "1",
    *TINY_UNET,
]
PROMISE = ["--data", "digits", "--privacy.target_epsilon", "10", "--privacy.delta", "1e-5"]
FINETUNE = [*PROMISE, "--privacy.epochs", "0.1", "--privacy.batch_size", "48"]
QUIET = ["--progress", "false", "--device", "cpu"]
SYNTHESIZE = ["synthesize", "--public", "{fonts}", "--private", "digits", "--epsilon", "8", "--out", "{new}"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Make a run with a public model by the command."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview, "PREVIEW_COLUMNS", 1)
        assert main(["pretrain", "--run", str(folder), *PRETRAIN, *QUIET]) == 0
    return folder


def fails(capsys, arguments: list[str]) -> str:
    """Run a command that must fail because of a user's mistake; return its one line."""
    assert main(arguments) == 2
    shown = capsys.readouterr()
    lines = [
        line
        for line in shown.err.splitlines()
        if not line.startswith(("note:", "public:", "private:", "not adapted:", "calibrating"))
    ]
    assert shown.out == "" and len(lines) == 1
    command = arguments[0] if arguments and arguments[0] in cli.COMMANDS else None
    assert lines[0].startswith(f"fastloda {command}: error: " if command else "fastloda: error: ")
    assert len(lines[0]) < 750
    return lines[0]


# -- running stages ---------------------------------------------------------------------------------------------------


def test_stages_from_the_command_line(run, capsys):
    capsys.readouterr()
    assert main(["finetune", "--run", str(run), *FINETUNE, "--training.seed", "0", *QUIET]) == 0
    shown = capsys.readouterr()
    assert yaml.safe_load(shown.out)["epsilon"] <= 10
    assert "1437, is treated as public" in shown.err
    assert main(["sample", "--run", str(run), "--count", "12", "--steps", "2", *QUIET]) == 0
    assert main(["sample", "--run", str(run), "--count", "12", "--steps", "2", "--public", *QUIET]) == 0
    capsys.readouterr()
    assert (
        main(
            [
                "evaluate",
                "--run",
                str(run),
                "--test",
                "digits-test",
                "--classifier.steps",
                "1",
                "--classifier.width",
                "8",
                *QUIET,
            ]
        )
        == 0
    )
    assert 0 <= yaml.safe_load(capsys.readouterr().out)["accuracy"] <= 1
    assert (run / "samples-public" / "grid.png").exists()


def test_account_prints_yaml(capsys):
    assert main("account --delta 1e-5 --sample_rate 0.1 --noise_multiplier 2 --steps 20".split()) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert 0 < shown["epsilon"] <= shown["epsilon_rdp"] and shown["steps"] == 20


def test_a_recorded_configuration_repeats_the_stage_and_options_win(run, tmp_path, capsys):
    recorded = str(run / "public" / "config.yaml")
    assert main(["pretrain", "--run", str(run), "--config", recorded, *QUIET]) == 0
    assert "already there" in capsys.readouterr().err
    message = fails(capsys, ["pretrain", "--run", str(run), "--config", recorded, "--training.steps", "9", *QUIET])
    assert "training.steps is 2 there and 9 here" in message


def test_lists_may_have_commas_or_come_from_yaml(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(demo, "demo", _recording(demo.demo, seen))
    (tmp_path / "c.yaml").write_text("epsilon: [1, 2.5]\n")
    (tmp_path / "d.yaml").write_text("epsilon: 1e1\n")
    assert main(["demo", "--epsilon", "1,10"]) == main(["demo", "--epsilon", "5", "--thorough"]) == 0
    assert main(["demo", "--config", str(tmp_path / "c.yaml")]) == 0
    assert main(["demo", "--config", str(tmp_path / "d.yaml"), "--settings.public_steps", "7"]) == 0
    assert [s["epsilon"] for s in seen] == [(1.0, 10.0), (5.0,), (1.0, 2.5), (10.0,)]
    assert [s["thorough"] for s in seen] == [False, True, False, False] and seen[3]["settings"].public_steps == 7
    assert seen[3]["settings"].choice_steps == seen[0]["settings"].choice_steps < demo.THOROUGH.choice_steps


def test_options_are_written_with_dashes_or_underscores(monkeypatch, capsys):
    seen = []
    replace_account(monkeypatch, lambda **options: seen.append(options))
    for name in ("--sample-rate", "--sample_rate"):
        assert main(["account", "--delta", "1e-5", f"{name}=0.1", "--composition", "a--b-c,--d-e"]) == 0
    assert [s["sample_rate"] for s in seen] == [0.1, 0.1] and seen[0]["composition"] == ("a--b-c", "--d-e")
    with pytest.raises(SystemExit):
        main(["account", "--help"])
    assert "--sample-rate" in capsys.readouterr().out


def _recording(function, seen: list):
    @functools.wraps(function)
    def record(*args, **options):
        seen.append(options)

    return record


# -- help ------------------------------------------------------------------------------------------------------------


def test_help_lists_the_commands_and_explains_them(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"fastloda {name} " in shown for name in cli.COMMANDS) and "fastloda demo --run runs/demo" in shown


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_option_has_a_help_text(command, capsys):
    parser = build_parser("fastloda", cli.command_function(command))
    # The docstrings of UNetConfig and of two fields of PublicTraining have another form.
    silent = [a.dest for a in parser._actions if not a.help and not a.dest.startswith(("unet.", "training."))]
    assert not silent
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "<class" not in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("fastloda ")


def test_help_and_imports_wait_for_nothing_that_they_do_not_need():
    """PyTorch takes seconds to import, and so do the accountants' libraries and Triton."""
    code = """
import sys
from fastloda.synthesis.cli import main
assert main(["--help"]) == main(["--version"]) == 0
assert "torch" not in sys.modules
from fastloda import DPTrainer, LoDAConv2d, ghost_dp_step, make_private
slow = {"dp_accounting", "prv_accountant", "scipy.stats", "triton", "matplotlib", "sklearn", "jsonargparse", "rich"}
assert not slow & set(sys.modules), slow & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("missing", ["jsonargparse", "matplotlib", "rich"])
def test_a_missing_extra_is_named(missing, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in (missing, "fastloda")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    from fastloda.synthesis.cli import main

    assert main(["demo", "--seeds", "0"]) == 2
    assert capsys.readouterr().err == (
        f"fastloda demo: error: {missing} is not installed: pip install 'fastloda[synthesis]'\n"
    )


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "command"),
        (["train"], "invalid choice: 'train'"),
        (["pretrain"], "required: --run, --data"),
        (["pretrain", "--run", "{new}", "--data", "font-digits", "--trainig.steps", "3"], "--trainig.steps"),
        (["pretrain", "--run", "{new}", "--data", "font-digits", "--training.steps", "many"], "training.steps"),
        (["pretrain", "--run", "{new}", "--data", "font-digits", "--training.steps", "0"], "steps"),
        (
            ["pretrain", "--run", "{new}", "--data", "font-digits", "--count", "40", "--unet.width", "7"],
            "width must be even, half sines",
        ),
        (["pretrain", "--run", "{new}", "--data", "digts"], "data must be one of"),
        (["pretrain", "--run", "{new}", "--data", "{new}.npz"], "no such file"),
        (["pretrain", "--run", "{new}", "--data", "{text}"], "not an npz file"),
        (["pretrain", "--run", "{text}/run", *PRETRAIN], "cannot make the folder"),
        (["pretrain", "--run", "{new}", "--data", "font-digits", "--config", "{new}.yaml"], "File does not exist"),
        (["pretrain", "--run", "{new}", "--data", "font-digits", "--config", "{broken}"], "Problems parsing config"),
        (["pretrain", "--run", "{new}", "--data", "font-digits", "--config", "{unknown}"], "option 'speed'"),
        (["finetune", "--run", "{run}"], "required: --privacy.target_epsilon, --privacy.delta, --data"),
        (["finetune", "--run", "{new}", *PROMISE], "no public model"),
        (["finetune", "--run", "{run}", *PROMISE, "--privacy.target_epsilon", "0"], "target_epsilon must be positive"),
        (["finetune", "--run", "{run}", *PROMISE, "--privacy.target_epsilon", "-3"], "target_epsilon must be positive"),
        (["finetune", "--run", "{run}", *PROMISE, "--privacy.delta", "1e-3"], "below 1 / records = 0.000696"),
        (["finetune", "--run", "{run}", *PROMISE, "--adapter.rank", "0"], "rank must be at least 1"),
        (["finetune", "--run", "{run}", *PROMISE, "--adapter.rank", "99"], "no layer to adapt"),
        (["finetune", "--run", "{run}", *PROMISE, "--data", "{nine}"], "1 x 9 x 9, the U-Net is for 1 x 8 x 8"),
        (
            ["finetune", "--run", "{run}", *PROMISE, "--data", "{eleven}"],
            "10 of the classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 are not among those of the public model",
        ),
        (["sample", "--run", "{new}"], "no public model"),
        (["sample", "--run", "{only_public}"], "no adapter in"),
        (["sample", "--run", "{run}", "--count", "0"], "count and batch_size must be at least 1"),
        (["sample", "--run", "{run}", "--steps", "2000"], "1 <= steps <= 1000"),
        (["evaluate", "--run", "{new}", "--test", "digits-test"], "no samples"),
        (["evaluate", "--run", "{new}"], "required: --test"),
        (["evaluate", "--run", "{new}", "--train", "digits", "--test", "{nine}"], "1 x 8 x 8"),
        (["synthesize", "--public", "font-digits"], "required: --private, --epsilon, --out"),
        ([*SYNTHESIZE, "--epsilon", "0"], "target_epsilon must be positive"),
        ([*SYNTHESIZE, "--delta", "0.1"], "below 1 / records"),
        ([*SYNTHESIZE, "--private", "{nine}"], "1 x 9 x 9, the U-Net is for 1 x 8 x 8"),
        ([*SYNTHESIZE, "--private", "{eleven}"], "10 of the classes 0, 1, 2, 3"),
        ([*SYNTHESIZE, "--rank", "0"], "rank must be at least 1"),
        ([*SYNTHESIZE, "--count", "0"], "count and batch_size"),
        (["account", "--delta", "0", "--sample_rate", "0.1", "--noise_multiplier", "1", "--steps", "9"], "delta"),
        (
            ["account", "--delta", "1e-5", "--sample_rate", "2", "--noise_multiplier", "1", "--steps", "9"],
            "sample_rate",
        ),
        (["account", "--delta", "1e-5"], "missing"),
        (["demo", "--run", "{new}", "--epsilon", "0"], "target_epsilon must be positive"),
        (["demo", "--run", "{new}", "--epsilon", "1,one"], "could not convert"),
        (["demo", "--run", "{new}", "--epsilon", "1,1"], "different ones"),
        (["demo", "--run", "{new}", "--seeds", "0"], "seeds must be at least 1"),
        (["demo", "--run", "{new}", "--settings.public_steps", "0"], "public_steps must be at least 1"),
        (
            ["demo", "--run", "{new}", "--settings.public_steps", "7", "--thorough"],
            "--thorough has settings of its own",
        ),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_mistake_gives_one_line_and_changes_nothing(run, tmp_path, capsys, monkeypatch, arguments, message):
    from fastloda.synthesis import synthesize
    from fastloda.synthesis.data import LabelledImages, font_digits

    monkeypatch.setattr(synthesize, "measure", lambda *_: Cost(1, 1, 1e-6, 1e-6, 1e-6, 1.0, 1.0))  # it takes seconds
    kinds = ("new", "text", "broken", "unknown", "nine", "eleven", "fonts", "only_public")
    places = {name: tmp_path / name for name in kinds}
    font_digits(20, seed=0).save_npz(places["fonts"])
    places["text"].write_text("text")
    places["broken"].write_text("training: [1")
    places["unknown"].write_text("training:\n  speed: 3\n")
    font_digits(20, seed=0, size=9).save_npz(places["nine"])
    images = font_digits(20, seed=0)
    LabelledImages(images.images, torch.arange(20) % 11, 11).save_npz(places["eleven"])
    places["only_public"].mkdir()
    (places["only_public"] / "public").symlink_to(run / "public")
    before = _everything(tmp_path) | _everything(run)
    filled = [argument.format(run=places["only_public"], **places) for argument in arguments]
    assert message in fails(capsys, filled)
    assert _everything(tmp_path) | _everything(run) == before


def _everything(folder: Path) -> dict[Path, int]:
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def test_a_fine_tuning_begun_on_another_model_is_refused(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "run" / "public").mkdir(parents=True)
    for name in ("model.safetensors", "config.yaml", "done.json"):
        (tmp_path / "run" / "public" / name).write_bytes((run / "public" / name).read_bytes())
    command = ["finetune", "--run", str(tmp_path / "run"), *FINETUNE, "--training.seed", "0", *QUIET]
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "save_loda", _interrupted)
        assert main(command) == 130
    capsys.readouterr()
    with monkeypatch.context() as patch:  # the public model is replaced in the meantime
        patch.setattr(preview, "PREVIEW_COLUMNS", 1)
        patch.chdir(tmp_path)
        assert main(["pretrain", "--run", "other", *PRETRAIN, "--training.seed", "7", *QUIET]) == 0
    (tmp_path / "other" / "public" / "model.safetensors").replace(tmp_path / "run" / "public" / "model.safetensors")
    capsys.readouterr()
    assert main(command) == 2
    assert "was made from another" in capsys.readouterr().err.splitlines()[-1]


def _interrupted(*args, **options):
    raise KeyboardInterrupt


def test_a_full_disk_gives_one_line_and_leaves_no_half_file(tmp_path, capsys, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        line = fails(capsys, ["pretrain", "--run", str(tmp_path / "run"), *PRETRAIN, *QUIET])
    assert "cannot write" in line and "No space left on device" in line
    assert [p for p in (tmp_path / "run").rglob("*") if p.is_file()] == []
    monkeypatch.setattr(preview, "PREVIEW_COLUMNS", 1)
    assert main(["pretrain", "--run", str(tmp_path / "run"), *PRETRAIN, *QUIET]) == 0  # it goes on when there is room


def replace_account(monkeypatch, function):
    monkeypatch.setattr(account, "account", functools.wraps(account.account)(function))


@pytest.mark.parametrize("bug", [RuntimeError("bug"), ZeroDivisionError(), KeyError("x"), AssertionError()])
def test_a_bug_keeps_its_traceback(monkeypatch, bug):
    def broken(**options):
        raise bug

    replace_account(monkeypatch, broken)
    with pytest.raises(type(bug)):
        main(["account", "--delta", "1e-5"])


def test_a_value_error_from_within_a_library_is_a_bug_too(monkeypatch):
    replace_account(monkeypatch, lambda **options: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        main(["account", "--delta", "1e-5"])


def test_warnings_are_lines_and_logging_is_left_as_it_was(monkeypatch, capsys):
    import logging

    logger = logging.getLogger("fastloda")
    state = (logger.level, logger.propagate, list(logger.handlers), warnings.showwarning)
    replace_account(monkeypatch, lambda **options: warnings.warn("looser than usual", stacklevel=1))
    assert main(["account", "--delta", "1e-5"]) == 0
    assert capsys.readouterr().err == "warning: looser than usual\n"
    assert (logger.level, logger.propagate, list(logger.handlers), warnings.showwarning) == state


# -- in a process of its own -----------------------------------------------------------------------------------------


def test_ctrl_c_exits_130_and_the_same_command_continues(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "public").symlink_to(run / "public")
    options = [
        "--privacy.epochs",
        "400",  # long enough that it is still running when the signal comes
        "--privacy.batch_size",
        "48",
        *PROMISE,
        "--training.seed",
        "0",
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-m", "fastloda", "finetune", "--run", str(tmp_path / "run"), *options]
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    # A test suite that runs in the background ignores SIGINT, and so would its children.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=heed
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "private" / "config.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert shown.splitlines()[-1] == "fastloda finetune: interrupted; the same command continues"
    assert "Traceback" not in shown
