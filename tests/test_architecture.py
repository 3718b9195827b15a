"""docs/architecture.md names every package and module folder, and none that does not exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "architecture.md").read_text()


def test_every_package_is_named_and_every_named_package_is_there():
    packages = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "fastloda").rglob("__init__.py")} | {"kernels"}
    named = set(re.findall(r"`((?:fastloda|kernels)[\w/]*)`", TEXT))
    assert {name for name in named if not (ROOT / name).suffix} == packages


def test_every_named_file_is_there():
    for line in TEXT.splitlines():
        room = re.match(r".*?`((?:fastloda|kernels)/[\w/]*?)\w+\.py`", line)
        for name in re.findall(r"[\w/]+\.py\b", line):
            places = [ROOT / name, ROOT / "fastloda" / name]
            places += [folder / name for folder in (ROOT / "fastloda").glob("*") if folder.is_dir()]
            places += [ROOT / room[1] / name] if room else []
            assert any(place.is_file() for place in places), f"{name} in {line!r}"
