"""Where the test functions of an earlier revision are now, and which are missing or new.

    python tests/support/moved_tests.py REVISION

Prints ``old file::name -> new file`` for every test function of the revision. Functions are matched by name; of several with
one name, those whose source is most alike belong together, and one without a namesake is matched to a new one of nearly the
same body. Ends with 1 if a test function is missing.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SAME_BODY = 0.9  # share of equal text from which a test of another name is the same one, renamed


@dataclass(frozen=True)
class Case:
    """A test function: its file, its name (with its class's) and its source without name and decorators."""

    file: str
    name: str
    body: str

    def __str__(self) -> str:
        return f"{self.file}::{self.name}"


def cases_in(file: str, source: str) -> Iterator[Case]:
    """The test functions of one file, also those in classes."""

    def collect(nodes: Iterable[ast.stmt], prefix: str = "") -> Iterator[Case]:
        for node in nodes:
            if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
                yield from collect(node.body, f"{node.name}::")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
                yield Case(file, prefix + node.name, "\n".join(map(ast.unparse, node.body)))

    yield from collect(ast.parse(source, file).body)


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def is_test_file(file: str) -> bool:
    return file.endswith(".py") and Path(file).name.startswith("test_")


def cases_of_revision(revision: str) -> list[Case]:
    files = [f for f in git("ls-tree", "-r", "--name-only", revision, "tests").splitlines() if is_test_file(f)]
    return [test for file in files for test in cases_in(file, git("show", f"{revision}:{file}"))]


def cases_of_working_tree() -> list[Case]:
    files = [f for f in sorted((ROOT / "tests").rglob("test_*.py"))]
    return [test for f in files for test in cases_in(str(f.relative_to(ROOT)), f.read_text(encoding="utf-8"))]


def likeness(one: Case, other: Case) -> float:
    """From 0 to 1: the share of equal text in the two bodies, and a little more in a file of the same name."""
    same_file = Path(one.file).name == Path(other.file).name
    ratio = difflib.SequenceMatcher(None, one.body, other.body, autojunk=False).ratio()
    return ratio + (1e-3 if same_file else 0)


def match(old: Iterable[Case], new: Iterable[Case]) -> tuple[dict[Case, Case], list[Case], list[Case]]:
    """Old tests with their new homes; the old ones that are missing; the new ones that no old one became."""
    homes: dict[Case, Case] = {}
    left, free = list(old), list(new)

    def pair(candidates: list[tuple[Case, Case]], least: float) -> None:
        """The most alike first, each test once."""
        ranked = sorted(((likeness(a, b), a, b) for a, b in candidates), key=lambda one: -one[0])
        for ratio, a, b in ranked:
            if ratio >= least and a in left and b in free:
                homes[a] = b
                left.remove(a)
                free.remove(b)

    by_name: dict[str, list[Case]] = {}
    for test in free:
        by_name.setdefault(test.name, []).append(test)
    for name in dict.fromkeys(test.name for test in left):
        pair([(a, b) for a in left if a.name == name for b in by_name.get(name, ())], 0.0)
    pair([(a, b) for a in left for b in free], SAME_BODY)
    return homes, left, free


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="of git, to compare the working tree with")
    args = parser.parse_args(argv)
    try:
        old = cases_of_revision(args.revision)
    except subprocess.CalledProcessError as error:
        parser.error(f"revision: {args.revision!r} can't be read: {error.stderr.strip()}")
    homes, missing, fresh = match(old, cases_of_working_tree())
    for test in old:
        if test in homes:
            home = homes[test]
            print(f"{test} -> {home.file if home.name == test.name else home}")
    for test in missing:
        print(f"missing: {test}")
    for test in fresh:
        print(f"new: {test}")
    changed = sum(test.body != home.body for test, home in homes.items())
    print(f"{len(old)} test functions then: {len(homes)} are there, {changed} of them with another body; "
          f"{len(missing)} missing, {len(fresh)} new")  # fmt: skip
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
