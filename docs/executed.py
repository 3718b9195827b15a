"""A Sphinx extension that runs the programs on the site's pages, and shows under each what it printed.

Python blocks run as they stand, scripts of examples/ as a whole, also where a page shows a part of one. One that fails fails the
build.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from sphinx.util.logging import getLogger

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = re.compile(
    r"^```(?:python\n(?P<code>.*?)|\{literalinclude\} (?:\.\./)*(?P<script>examples/\w+\.py)\n.*?)^```$",
    flags=re.DOTALL | re.MULTILINE,
)


def with_output(app, page: str, source: list[str]) -> None:
    """Put behind each program of a page the block of what it prints; not where links alone are checked."""
    if app.builder.format == "html":
        source[0] = PROGRAM.sub(lambda match: f"{match[0]}\n\n{_printed(match, page)}", source[0])


def _printed(match: re.Match, page: str) -> str:
    """Run a program in a folder of its own; -> a block of MyST."""
    with tempfile.TemporaryDirectory() as folder:
        program = ROOT / match["script"] if match["script"] else Path(folder, "program.py")
        if match["code"]:
            program.write_text(match["code"])
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, program], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        getLogger(__name__).warning("%s does not run: %s", program.name, done.stderr, location=page)
    return f"```{{code-block}} none\n:class: printed\n\n{done.stdout.rstrip()}\n```" if done.stdout else ""


def setup(app) -> dict:
    app.connect("source-read", with_output)
    return {"parallel_read_safe": True}
