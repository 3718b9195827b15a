"""The settings of the documentation site, which `make docs` builds."""

import re
import sys
from pathlib import Path

from fastloda import __version__

project = "FastLoDA"
author = "FastLoDA developers"
version = release = __version__
html_title = f"FastLoDA {version}"
html_show_copyright = False
html_show_sphinx = False

sys.path.append(str(Path(__file__).parent))
extensions = ["executed", "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["figures"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False
pygments_style, pygments_dark_style = "friendly", "github-dark"

highlight_language = "none"  # what no language is given for is a shell's, or an equation
default_role = "code"  # docstrings mark names by single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
# Returns are prose, of which napoleon would take all before a colon for a type; attributes are those of dataclasses.
napoleon_custom_sections = ["Returns", ("Attributes", "params_style")]


CODE, MARKUP = re.compile(r"\s*(>>>|\.\.\. )"), re.compile(r"(?<=\w)_(?!\w)|\||\*(?=\S)")


def as_restructured_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Escape what plain docstrings say and reStructuredText would read as markup: |g|, *args, a name_ that ends so."""
    for number, line in enumerate(lines):
        if not CODE.match(line):
            parts = re.split(r"(`[^`]*`)", line)
            lines[number] = "".join(part if part.startswith("`") else MARKUP.sub(r"\\\g<0>", part) for part in parts)


def setup(app) -> None:
    app.connect("autodoc-process-docstring", as_restructured_text, priority=100)  # before napoleon
