"""`torchrun -m -- fastloda finetune` is one run: its statement is that of one process, and with the same losses its adapter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastloda
from fastloda.errors import UserError
from fastloda.synthesis import arguments
from fastloda.synthesis.arguments import resolve_device
from fastloda.synthesis.diffusion.pretrain import PublicTraining
from fastloda.synthesis.runs import digest
from fastloda.synthesis.settings import UNetShape
from fastloda.synthesis.stages import pretrain, preview

UNET = UNetShape(width=8, norm_groups=4)
FINETUNE = "finetune --data digits --privacy.target_epsilon 10 --privacy.delta 1e-5 --privacy.epochs 0.1".split()
FINETUNE += "--privacy.batch_size 48 --training.seed 1 --training.micro_batch_size 16 --device cpu".split()
TIMEOUT = 240  # seconds; two processes take about fifteen
COMMAND = """
import sys
import torch
from fastloda.synthesis import settings
from fastloda.synthesis.cli import main

def without_chance(self, process, views):
    def losses(model, batch, generator):
        images, labels = batch
        n, t = len(images), torch.full((len(images) * views,), 300)
        x, y = images.repeat_interleave(views, 0), labels.repeat_interleave(views, 0)
        return (model(x * 0.5, t, y) - x).square().mean((1, 2, 3))
    return losses

settings.FineTuning.losses = without_chance
sys.exit(main())
"""


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> Path:
    """Make the public model of all runs."""
    folder = tmp_path_factory.mktemp("torchrun")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview, "PREVIEW_COLUMNS", 1)
        training = PublicTraining(steps=3, batch_size=8, warmup=1, seed=0)
        pretrain(folder, data="font-digits", count=64, unet=UNET, training=training, progress=False, device="cpu")
    (folder / "command.py").write_text(COMMAND)
    return folder


def torchrun(*command: str, ranks: int = 2) -> subprocess.CompletedProcess:
    """Run a script, or ("fastloda", ...), on ranks; `--` keeps torchrun from reading --run as a prefix of its --run-path."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return _run([*launcher, *["-m"] * (command[0] == "fastloda"), "--", *command])


def _run(command: list[str]) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fastloda.__file__).parents[1])}
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment)


def own_lines(done: subprocess.CompletedProcess) -> list[str]:
    """Return the command's own lines on stderr, without those of torchrun."""
    own = ("fastloda finetune", "fastloda pretrain", "note:", "calibrating", "noise multiplier", "warning:")
    return [line for line in done.stderr.splitlines() if line.startswith(own)]


def test_two_ranks_are_one_run(public, tmp_path):
    runs = {ranks: tmp_path / str(ranks) for ranks in (1, 2)}
    for folder in runs.values():
        folder.mkdir()
        (folder / "public").symlink_to(public / "public")
    script, alone, both = str(public / "command.py"), *([*FINETUNE, "--run", str(folder)] for folder in runs.values())
    first = _run([sys.executable, script, *alone])
    assert first.returncode == 0, first.stderr
    done = torchrun(script, *both)
    assert done.returncode == 0, done.stderr
    one, two = (folder / "private" for folder in runs.values())
    ids = [digest(folder / "adapter.safetensors")[:16] for folder in (one, two)]  # of releases that differ by rounding
    assert done.stdout.replace(*reversed(ids)) == first.stdout and len(done.stdout.splitlines()) > 5
    assert own_lines(done) == own_lines(first) and done.stderr.count("private:") > 0
    assert sorted(os.listdir(one)) == sorted(os.listdir(two))
    assert (one / "privacy.json").read_text() == (two / "privacy.json").read_text().replace(*reversed(ids))
    assert json.loads((two / "privacy.json").read_text())["steps"] == 3
    found, wanted = load_file(two / "adapter.safetensors"), load_file(one / "adapter.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():  # Adam enlarges the rounding of gradients near 0
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    before = {path: path.stat().st_mtime_ns for path in two.iterdir()}
    again = torchrun(script, *both)
    assert again.returncode == 0 and again.stderr.count("already there, with these settings") == 1
    assert {path: path.stat().st_mtime_ns for path in two.iterdir()} == before


def test_a_mistake_is_told_once_and_changes_nothing(public, tmp_path):
    done = torchrun("fastloda", *FINETUNE, "--run", str(tmp_path / "run"), "--training.speed", "3")
    assert done.returncode != 0 and "--training.speed" in own_lines(done)[0] and len(own_lines(done)) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_stage_of_one_process_is_refused_in_one_line(tmp_path):
    done = torchrun("fastloda", "pretrain", "--data", "font-digits", "--run", str(tmp_path / "run"))
    assert done.returncode != 0
    assert own_lines(done) == ["fastloda pretrain: error: runs in one process: start it without torchrun"]
    assert list(tmp_path.iterdir()) == []


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_gpus(monkeypatch) -> list[int]:
    """Imitate a machine with two GPUs; the list gets each index that is made the current device."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def on_ranks(monkeypatch, local_rank: int, size: int = 2) -> None:
    monkeypatch.setattr(arguments.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(arguments.dist, "get_world_size", lambda: size)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))


def test_a_gpu_with_a_number_is_made_the_current_one(two_gpus):
    assert resolve_device("cuda:1") == torch.device("cuda", 1) and two_gpus == [1]
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    with pytest.raises(UserError, match="no GPU 2 for --device cuda:2: the 2 that"):
        resolve_device("cuda:2")


def test_each_rank_has_a_gpu_of_its_own(two_gpus, monkeypatch):
    on_ranks(monkeypatch, 1)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 1) and two_gpus == [1, 1]
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="cuda:1 is one GPU, and each rank needs its own"):
        resolve_device("cuda:1")
    on_ranks(monkeypatch, 2, size=3)
    with pytest.raises(UserError, match="no GPU 2 .*start at most 2 ranks"):
        resolve_device("auto")


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps"])
def test_an_absent_device_is_named(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"device {device}: PyTorch finds no .*--device cpu"):
        resolve_device(device)


def test_an_apple_gpu_is_accepted_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("mps") == torch.device("mps")
