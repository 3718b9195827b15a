"""Build and test the package from its sdist, with one Python and one PyTorch, in an environment that is removed afterwards.

    make dist && python scripts/versions.py python3.12 torch==2.13.0

The first argument is the interpreter; pip installs the others together with the package. The result is a row of
docs/results/versions.json, of which `scripts/readme_table.py` makes the table in docs/installation.md. PyTorch's builds for CUDA
take some 7 GB while this runs.
"""

import datetime
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "results" / "versions.json"
TESTS = [
    "tests/per_sample/test_exact.py::test_float32_is_as_good_as_pytorch",  # adapters, and layers in every position
    "tests/per_sample/test_exact.py::test_functional_uses_with_a_rule_are_exact",
    "tests/per_sample/test_rules.py::test_norms_and_clipped_sums_are_exact",  # every kind of layer that has a rule
    "tests/privacy/test_sensitivity.py",  # what one record may move, and the noise
    "tests/kernels/test_kernels.py::test_the_kernels_are_what_runs",  # Triton's interpreter
    "tests/kernels/test_kernels.py::test_pointwise_forward",
    "tests/kernels/test_kernels.py::test_clip_sum",
]
FOUND = """
import json, platform, importlib.metadata as metadata
names = ("torch", "triton", "numpy")
print(json.dumps({"python": platform.python_version()} | {name: metadata.version(name) for name in names}))
"""


def row(interpreter: str, requirements: list[str], work: Path) -> dict:
    """Install the sdist, run the README's ten lines and TESTS, and make the row of the result."""
    sdist = max((ROOT / "build" / "dist").glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(work, filter="data")
    source, python = work / sdist.name.removesuffix(".tar.gz"), work / "env" / "bin" / "python"
    subprocess.run([interpreter, "-m", "venv", work / "env"], check=True)
    pip = [python, "-m", "pip", "install", "-q", "--no-cache-dir"]
    subprocess.run([*pip, f"{sdist}[triton]", "pytest", "hypothesis", *requirements], check=True)
    subprocess.run([python, "-I", "scripts/wheel_smoke.py", "README.md"], cwd=source, check=True)
    outcome = work / "outcome.xml"
    # The program and not the module: that would put the unpacked sources before the installed package.
    command = [python.parent / "pytest", "-q", "-rs", "-p", "no:cacheprovider", f"--junitxml={outcome}", *TESTS]
    exit_code = subprocess.run(command, cwd=source, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    versions = json.loads(subprocess.run([python, "-c", FOUND], check=True, capture_output=True, text=True).stdout)
    suite = next(ElementTree.parse(outcome).iter("testsuite"))
    tests, failures, errors, skipped = (int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped"))
    if exit_code not in (0, 1):
        raise SystemExit("pytest itself failed")
    counts = {"passed": tests - failures - errors - skipped, "failed": failures + errors, "skipped": skipped}
    return versions | counts | {"date": str(datetime.date.today())}


def main() -> int:
    interpreter, *requirements = sys.argv[1:]
    with tempfile.TemporaryDirectory() as work:
        found = row(interpreter, requirements, Path(work))
    known = json.loads(FILE.read_text()) if FILE.exists() else []
    same = ("python", "torch")
    known = [other for other in known if any(other[name] != found[name] for name in same)] + [found]
    known.sort(key=lambda each: [[int(part) for part in each[name].split("+")[0].split(".")] for name in same])
    FILE.write_text("[\n" + ",\n".join(f"  {json.dumps(each)}" for each in known) + "\n]\n")
    print(json.dumps(found))
    return int(found["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
