"""What README.md and the site show is true: each Python snippet runs as it stands, each command line parses, and each link of
the pages in the root folder leads somewhere. Links between the site's pages are checked by `make docs`."""

import re
import runpy
import shlex
from importlib import metadata
from pathlib import Path

import pytest

import fastloda
from fastloda.synthesis.cli import COMMANDS, command_function
from fastloda.synthesis.parser import build_parser, parse

ROOT = Path(__file__).parent.parent
AT_ROOT = sorted(ROOT.glob("*.md"))
SITE = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "results" not in path.relative_to(ROOT).parts]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in [*AT_ROOT, *SITE]}
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
SNIPPETS = {
    f"{page}:{number}": code
    for page, text in TEXTS.items()
    for number, code in enumerate(code for language, code in FENCE.findall(text) if language == "python")
}


def shown_lines(text: str) -> list[str]:
    """List the lines of a page's blocks that a shell would take: fenced without a language, or indented by four spaces."""
    fenced = [line for language, block in FENCE.findall(text) if not language for line in block.splitlines()]
    indented = re.findall(r"^    (\S.*)$", FENCE.sub("", text), flags=re.MULTILINE)
    return [re.split(r"\s#\s", line)[0].strip() for line in fenced + indented]


SHOWN = sorted({line for text in TEXTS.values() for line in shown_lines(text)})
INLINE = sorted({code for text in TEXTS.values() for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", text))})
COMMAND_LINES = [line for line in SHOWN if re.match(r"(torchrun .*-- )?fastloda ", line)]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(SNIPPETS[name], name, "exec"), {})


def test_there_are_snippets_and_command_lines():
    assert "README.md:0" in SNIPPETS and len(SNIPPETS) >= 9
    assert {command for line in COMMAND_LINES for command in line.split() if command in COMMANDS} == set(COMMANDS)


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_command_line_parses(line):
    words = shlex.split(line)
    command, *options = words[words.index("fastloda") + 1 :]
    if command != "--version":
        parse(f"fastloda {command}", command_function(command), options)


@pytest.mark.parametrize("code", [code for code in INLINE if code.startswith("fastloda ")])
def test_options_of_a_command_in_a_sentence_exist(code):
    _, command, *words = code.split()
    if command not in ("COMMAND", "--help"):
        known = build_parser(f"fastloda {command}", command_function(command)).format_help()
        for option in [word for word in words if word.startswith("--")]:
            assert re.search(rf"{option.replace('_', '-')}\b", known), f"{command} has no {option}"


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {match[1] for code in SHOWN + INLINE if (match := re.match(r"make (\w+)", code))}
    workflows = "".join(path.read_text() for path in (ROOT / ".github").rglob("*.yml"))
    assert {"demo", "test", "docs"} <= named | set(re.findall(r"run: make (\w+)", workflows)) <= targets


def test_scripts_and_extras_exist():
    programs = {
        word for line in SHOWN + INLINE for word in line.split() if re.fullmatch(r"(examples|scripts)/\w+(\.py)?", word)
    }
    assert programs and all((ROOT / program).is_file() for program in programs)
    extras = {
        name for line in SHOWN + INLINE for names in re.findall(r"fastloda\[(\w+)\]", line) for name in names.split(",")
    }
    assert extras <= set(metadata.metadata("fastloda").get_all("Provides-Extra") or ())


@pytest.mark.parametrize("page", [path.name for path in AT_ROOT])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)\s]+)\)", TEXTS[page]):
        name, _, anchor = target.partition("#")
        assert (ROOT / name).exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", (ROOT / name).read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}, target


def test_figures_are_those_of_the_result_files():
    script = runpy.run_path(str(ROOT / "scripts" / "readme_table.py"))
    for page in script["PAGES"]:
        assert script["with_figures"](page) == TEXTS[page], f"{page}: run scripts/readme_table.py"


def test_the_readme_is_one_page():
    assert len(TEXTS["README.md"].splitlines()) <= 150


def test_the_api_reference_has_the_public_names():
    listed = re.findall(r":: fastloda\.(\w+)$", TEXTS["docs/api.md"], flags=re.MULTILINE)
    assert sorted(listed) == sorted(fastloda.__all__)
