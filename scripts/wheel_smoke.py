"""Run the README's first snippet on an installed wheel: `python -I scripts/wheel_smoke.py README.md`."""

import re
import sys
from pathlib import Path

import fastloda

assert Path(sys.prefix) in Path(fastloda.__file__).parents, f"{fastloda.__file__} is not the installed package"
missing = [name for name in fastloda.__all__ if not hasattr(fastloda, name)]
assert not missing, f"public names that are not there: {missing}"
snippet = re.search(r"```python\n(.*?)```", Path(sys.argv[1]).read_text(), flags=re.DOTALL)[1]
exec(compile(snippet, sys.argv[1], "exec"), {})
