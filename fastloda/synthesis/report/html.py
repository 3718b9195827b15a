"""A self-contained HTML page with text, tables and figures inside it. Everything that is filled in is escaped."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, StrictUndefined

from fastloda.synthesis.report.tables import Table


@dataclass(frozen=True)
class Figure:
    """A PNG image and a caption."""

    caption: str
    png: bytes
    pixelated: bool = False

    @property
    def source(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Page:
    """The contents of a report, in their order.

    Attributes:
        title, lead: headline, and one paragraph.
        results: the main table.
        more: further tables, below the chart.
        chart: plot of the accuracies.
        samples: grids of images.
        statement: paragraphs about privacy.
        spent: facts of each private run: run -> (name -> value).
        curves: plots of epsilon by step.
        settings: name -> (value, how it was chosen).
        timings: stage -> seconds.
        environment: name -> value.
    """

    title: str
    lead: str
    results: Table
    chart: Figure
    samples: Sequence[Figure]
    statement: Sequence[str]
    spent: Mapping[str, Mapping[str, object]]
    curves: Sequence[Figure]
    more: Sequence[Table] = ()
    settings: Mapping[str, tuple[object, str]] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    environment: Mapping[str, object] = field(default_factory=dict)


def render(page: Page) -> str:
    """Render the page as HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["show"] = lambda value: f"{value:.6g}" if isinstance(value, float) else str(value)
    return environment.from_string(TEMPLATE).render(page=page)


# The template is in the module, so that it needs no packaging.
MACROS = """\
{% macro figure(item) %}
<figure>
<figcaption>{{ item.caption }}</figcaption>
<img{% if item.pixelated %} class="pixelated"{% endif %} src="{{ item.source }}" alt="{{ item.caption }}">
</figure>
{% endmacro %}
{% macro rows_table(table, kind) %}
<div class="wide"><table class="{{ kind }}">
<thead><tr>
{% for name in table.columns %}
<th{% if loop.index0 >= table.left %} class="number"{% endif %}>{{ name }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>
{% for cell in row %}
<td{% if loop.index0 >= table.left %} class="number"{% endif %}>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% for note in table.notes %}
<p>{{ note }}</p>
{% endfor %}
{% endmacro %}
{% macro facts_table(facts) %}
<div class="wide"><table><tbody>
{% for name, value in facts.items() %}
<tr><td class="name"><code>{{ name }}</code></td><td>{{ value | show }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
"""

TEMPLATE = (
    MACROS
    + """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ page.title }}</title>
<style>
:root { --ink: #1c2026; --soft: #5c636e; --paper: #fdfdfc; --line: #dfe2e6; --band: #f3f5f7; --accent: #1f66b3 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #9aa2ad; --paper: #14171b; --line: #30363e; --band: #1b1f25; --accent: #79b0ee }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 54rem; padding: 2.5rem 1.25rem 5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, sans-serif }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; letter-spacing: -.01em }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .8rem; padding-top: .8rem; border-top: 1px solid var(--line) }
p { margin: 0 0 .8rem }
.lead { font-size: 1.08rem; color: var(--soft) }
.wide { overflow-x: auto }
table { width: 100%; border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding: .6rem 0 .3rem }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--line); white-space: nowrap }
th, td { padding: .4rem .9rem .4rem 0; vertical-align: top }
tbody tr + tr > * { border-top: 1px solid var(--line) }
.number { text-align: right; padding-right: 0; padding-left: .9rem; white-space: nowrap }
td.name { white-space: nowrap }
.results td { font-size: 1rem }
code { font: .88em ui-monospace, monospace }
figure { margin: 1rem 0 1.6rem }
figcaption { color: var(--soft); font-size: .92rem; margin-bottom: .45rem }
img { max-width: 100%; height: auto; display: block }
.pixelated { image-rendering: pixelated; border-radius: 6px }
.notice { background: var(--band); border-left: 3px solid var(--accent); border-radius: 4px; padding: .8rem 1rem }
.notice p:last-child { margin: 0 }
details summary { cursor: pointer; color: var(--accent); margin: .4rem 0 }
</style>
</head>
<body>
<header>
<h1>{{ page.title }}</h1>
<p class="lead">{{ page.lead }}</p>
</header>
<main>
<section>
{{ rows_table(page.results, "results") }}
{{ figure(page.chart) }}
{% for table in page.more %}
<h2>{{ table.title }}</h2>
{{ rows_table(table, "") }}
{% endfor %}
</section>
<section>
<h2>Images</h2>
{% for item in page.samples %}
{{ figure(item) }}
{% endfor %}
</section>
<section>
<h2>Privacy</h2>
<div class="notice">
{% for paragraph in page.statement %}
<p>{{ paragraph }}</p>
{% endfor %}
</div>
{% for item in page.curves %}
{{ figure(item) }}
{% endfor %}
{% for run, facts in page.spent.items() %}
<details><summary>{{ run }}</summary>
{{ facts_table(facts) }}
</details>
{% endfor %}
</section>
<section>
<h2>Hyper-parameters, and how each was chosen</h2>
<div class="wide"><table>
<thead><tr><th>Setting</th><th>Value</th><th>How it was chosen</th></tr></thead>
<tbody>
{% for name, (value, reason) in page.settings.items() %}
<tr><td class="name"><code>{{ name }}</code></td><td>{{ value | show }}</td><td>{{ reason }}</td></tr>
{% endfor %}
</tbody></table></div>
</section>
<section>
<h2>Time</h2>
<div class="wide"><table>
<thead><tr><th>Stage</th><th class="number">Seconds</th></tr></thead>
<tbody>
{% for stage, seconds in page.timings.items() %}
<tr><td>{{ stage }}</td><td class="number">{{ "%.0f" | format(seconds) }}</td></tr>
{% endfor %}
</tbody></table></div>
</section>
<section>
<h2>Machine and versions</h2>
{{ facts_table(page.environment) }}
</section>
</main>
</body>
</html>
"""
)
