"""Run the README's first snippet with an installed wheel, and import the modules that the given extras serve.

python -I scripts/wheel_smoke.py README.md [EXTRA ...]
"""

import importlib
import re
import sys
from pathlib import Path

import fastloda

MODULES = {"synthesis": ["fastloda.synthesis.stages"], "triton": ["triton", "fastloda.kernels.adapter_forward"]}

page, *extras = sys.argv[1:]
assert Path(sys.prefix) in Path(fastloda.__file__).parents, f"{fastloda.__file__} is not the installed package"
missing = [name for name in fastloda.__all__ if not hasattr(fastloda, name)]
assert not missing, f"public names that are not there: {missing}"
snippet = re.search(r"```python\n(.*?)```", Path(page).read_text(), flags=re.DOTALL)[1]
exec(compile(snippet, page, "exec"), {})
for extra in extras:
    for module in MODULES.get(extra, [extra, f"fastloda.integrations.{extra}"]):
        importlib.import_module(module)
