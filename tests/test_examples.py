"""Every script in examples/ runs as a user would run it, prints something, and gives no warnings."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {name: name for name in ("opacus", "diffusers", "peft", "timm", "transformers", "accelerate", "lightning")}
NEEDS |= {r"torch\.utils\.tensorboard": "tensorboard"}


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(script, tmp_path):
    for module in [name for name in NEEDS if re.search(rf"^(import|from) {name}\b", script.read_text(), re.MULTILINE)]:
        pytest.importorskip(NEEDS[module], reason=f"{script.name} needs {NEEDS[module]}")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.split()) > 5 and "Warning" not in done.stderr


def test_there_are_examples():
    assert len(EXAMPLES) >= 8
