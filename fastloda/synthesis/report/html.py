"""A self-contained HTML page of sections: text, tables and figures are in the file itself. Everything filled in is escaped.

It can be read on a phone (360 px), on a desktop, and in print; it is always dark on light, because it may have to be signed.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jinja2 import Environment, StrictUndefined

from fastloda.synthesis.report.tables import Table


@dataclass(frozen=True)
class Figure:
    """A PNG image, and a caption that also describes it to readers who cannot see it."""

    caption: str
    png: bytes

    @property
    def source(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Text:
    """Paragraphs: plain, in a box, or in a red box that warns."""

    paragraphs: Sequence[str]
    look: Literal["plain", "notice", "alarm"] = "plain"


@dataclass(frozen=True)
class Bullets:
    """A list of lines."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Facts:
    """A table of names and values; if `folded`, only its title is shown until it is clicked."""

    values: Mapping[str, object]
    title: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Blanks:
    """A row of lines to fill in by hand, each with a label below it."""

    labels: Sequence[str]


@dataclass(frozen=True)
class Section:
    """A part of a page under a title ("" for no title)."""

    title: str
    blocks: Sequence[Figure | Text | Bullets | Facts | Blanks | Table]


@dataclass(frozen=True)
class Page:
    """A headline, one paragraph, and the sections below them."""

    title: str
    lead: str
    sections: Sequence[Section]


def render(page: Page) -> str:
    """Render the page as HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["show"] = lambda value: f"{value:.6g}" if isinstance(value, float) else str(value)
    environment.filters["kind"] = lambda block: type(block).__name__
    return environment.from_string(TEMPLATE).render(page=page)


# The template is in this module, so that it needs no package data.
STYLE = """\
:root { --ink: #1c2026; --soft: #535a65; --line: #d5d9de; --band: #f1f4f7; --accent: #1f5fa8; --alarm: #b3141d }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0 auto; max-width: 50rem; padding: 2.5rem 1.25rem 4rem; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .6rem }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.4rem 0 .8rem; padding-top: .8rem; border-top: 1px solid var(--line) }
p, ul { margin: 0 0 .8rem }
ul { padding-left: 1.3rem }
li { margin-bottom: .35rem }
.lead { font-size: 1.06rem; color: var(--soft) }
.wide { overflow-x: auto; margin-bottom: 1rem }
table { width: 100%; border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding: .6rem 0 .3rem }
th { text-align: left; vertical-align: bottom; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--line) }
th, td { padding: .4rem .9rem .4rem 0 }
td { vertical-align: top }
th:last-child, td:last-child { padding-right: 0 }
tbody tr + tr > * { border-top: 1px solid var(--line) }
.number { text-align: right }
td.number { white-space: nowrap }
.facts { margin-bottom: 1rem }
.facts td { overflow-wrap: anywhere }
.facts td:first-child { width: 38%; font-weight: 600 }
figure { margin: 1rem 0 1.6rem }
figcaption { color: var(--soft); font-size: .92rem; margin-bottom: .45rem }
img { display: block; max-width: min(100%, 34rem); height: auto }
.notice, .alarm { background: var(--band); border-left: 4px solid var(--accent); padding: .8rem 1rem; margin-bottom: 1rem }
.alarm { background: #fdeced; border-color: var(--alarm); color: var(--alarm); font-weight: 600 }
.notice p:last-child, .alarm p:last-child { margin: 0 }
details summary { cursor: pointer; color: var(--accent); margin: .4rem 0 }
.blanks { display: flex; flex-wrap: wrap; gap: 0 1.5rem }
.blanks p { flex: 1 1 11rem; margin: 3.2rem 0 0; border-top: 1px solid var(--ink); padding-top: .2rem; color: var(--soft);
  font-size: .88rem }
@media (max-width: 30rem) {
  body { padding: 1.25rem 1rem 2.5rem }
  h1 { font-size: 1.45rem }
  th, td { padding-right: .6rem }
  .facts td, .facts td:first-child { display: block; width: auto; padding-right: 0 }
  .facts td:first-child { padding-bottom: 0 }
  .facts td + td { border: 0; padding-top: .1rem }
}
@media print {
  @page { size: A4; margin: 16mm 18mm }
  body { max-width: none; padding: 0; font-size: 10.5pt; line-height: 1.4; print-color-adjust: exact }
  h2 { margin-top: 1.4rem; break-after: avoid }
  .wide { overflow: visible }
  th, td { padding-top: .22rem; padding-bottom: .22rem }
  tr, figure, .notice, .alarm, .blanks, li { break-inside: avoid }
  thead { display: table-header-group }
  img { max-width: min(100%, 10cm) }
  details::details-content { content-visibility: visible; height: auto }
}
"""

TEMPLATE = """\
{% macro figure(item) %}
<figure>
<figcaption>{{ item.caption }}</figcaption>
<img src="{{ item.source }}" alt="{{ item.caption }}">
</figure>
{% endmacro %}
{% macro table(item) %}
<div class="wide"><table>
{% if item.title %}
<caption>{{ item.title }}</caption>
{% endif %}
<thead><tr>
{% for name in item.columns %}
<th{% if loop.index0 >= item.left %} class="number"{% endif %}>{{ name }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in item.rows %}
<tr>
{% for cell in row %}
<td{% if loop.index0 >= item.left %} class="number"{% endif %}>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% for note in item.notes %}
<p>{{ note }}</p>
{% endfor %}
{% endmacro %}
{% macro facts(item) %}
{% if item.folded %}
<details><summary>{{ item.title }}</summary>
{% endif %}
<table class="facts">
{% if item.title and not item.folded %}
<caption>{{ item.title }}</caption>
{% endif %}
<tbody>
{% for name, value in item.values.items() %}
<tr><td>{{ name }}</td><td>{{ value | show }}</td></tr>
{% endfor %}
</tbody></table>
{% if item.folded %}
</details>
{% endif %}
{% endmacro %}
{% macro block(item) %}
{% set kind = item | kind %}
{% if kind == "Figure" %}
{{ figure(item) }}
{% elif kind == "Table" %}
{{ table(item) }}
{% elif kind == "Facts" %}
{{ facts(item) }}
{% elif kind == "Bullets" %}
<ul>
{% for line in item.lines %}
<li>{{ line }}</li>
{% endfor %}
</ul>
{% elif kind == "Blanks" %}
<div class="blanks">
{% for label in item.labels %}
<p>{{ label }}</p>
{% endfor %}
</div>
{% else %}
<div class="{{ item.look }}">
{% for paragraph in item.paragraphs %}
<p>{{ paragraph }}</p>
{% endfor %}
</div>
{% endif %}
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<title>{{ page.title }}</title>
<style>
STYLE
</style>
</head>
<body>
<header>
<h1>{{ page.title }}</h1>
<p class="lead">{{ page.lead }}</p>
</header>
<main>
{% for section in page.sections %}
<section>
{% if section.title %}
<h2>{{ section.title }}</h2>
{% endif %}
{% for item in section.blocks %}
{{ block(item) }}
{% endfor %}
</section>
{% endfor %}
</main>
</body>
</html>
""".replace("STYLE", STYLE)
