"""What the pages name is there: commands, linked files, and headings."""

import ast
import re

import pytest
from support.source import ROOMS, ROOT, SCRIPT, module_name

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "miniature/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
SCRIPTS = [*sorted((ROOT / "configs").rglob("*.sh")), *sorted((ROOT / "benchmarks").rglob("*.sh")), ROOT / "Makefile"]
SOURCES = [p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py"))]
COMMAND = re.compile(r"python3? -m ([a-z_]\w*(?:\.\w+)*)(?!\.?\w|[.]?\{)")
LINK = re.compile(r"\]\(([^)\s]+?)\)|<img[^>]+src=\"([^\"]+)\"")
OURS = {*ROOMS, SCRIPT}


def name_of(path):
    return str(path.relative_to(ROOT))


def commands(text):
    """The modules of this project that a text runs by ``python -m``."""
    return {name for name in COMMAND.findall(text) if name.split(".")[0] in OURS}


def runs(module):
    """Whether ``python -m module`` finds a file that guards its command."""
    path = ROOT / module.replace(".", "/")
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.is_file():
        return False
    guards = [n.test for n in ast.parse(file.read_text()).body if isinstance(n, ast.If)]
    return any(ast.unparse(test) == "__name__ == '__main__'" for test in guards)


def anchors(page):
    """The headings of a page as GitHub's links name them."""
    found, fenced = set(), False
    for line in page.read_text().splitlines():
        fenced ^= line.startswith("```")
        if line.startswith("#") and not fenced:
            title = re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower())
            found.add(title.replace(" ", "-"))
    return found


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS], ids=name_of)
def test_every_command_that_a_page_names_runs(path):
    assert [name for name in sorted(commands(path.read_text())) if not runs(name)] == []


def test_every_command_that_the_source_names_runs():
    found = {name_of(path): sorted(name for name in commands(path.read_text()) if not runs(name)) for path in SOURCES}
    assert {path: names for path, names in found.items() if names} == {}


def test_commands_are_found_where_they_are():
    assert commands("`python -m benchmarks.study.again AGAIN`, python3 -m eval.report.") == {
        "benchmarks.study.again",
        "eval.report",
    }
    assert runs("benchmarks.study") and not runs("benchmarks.study.grid") and not runs("benchmarks.nothing")
    assert module_name(ROOT / "eval/__init__.py") == "eval"
    readme = commands((ROOT / "README.md").read_text())
    assert {"eval.memorization", "benchmarks.study"} <= readme


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_relative_link_resolves(path):
    lost = []
    for target in (one or other for one, other in LINK.findall(path.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            lost.append(target)
    assert lost == []
