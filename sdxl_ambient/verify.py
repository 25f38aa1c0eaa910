"""Checks every bit of what the toolkit wrote: stores, checkpoints, adapters, drawn images, cached embeddings, reports.

    python -m sdxl_ambient.verify PATH …

A path is a file, or a folder that is looked through. What has no checksum is counted and named. The exit code is 0 where
everything that has one is as it was written, else 2, with a line for each damaged file. Checksums find damage. They are no
signature: who can write a whole folder can write its checksums.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_ambient.errors import StageError, UserError, one_line, run_command

if TYPE_CHECKING:
    from collections.abc import Iterator

_SHOWN = 10


class Findings:
    """What was looked at: how many files are as they were written, which are not, and which have no checksum."""

    def __init__(self):
        self.whole, self.damaged, self.unknown = 0, list[str](), list[Path]()

    def check(self, path: Path, count: int, function) -> None:
        """Count ``count`` files as whole where ``function`` raises nothing, and its error's line else."""
        try:
            found = function()
        except (UserError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            line = one_line(error, most=None)
            self.damaged.append(line if str(path) in line else f"{path}: {line}")
            return
        if found is False:
            self.unknown.append(path)
        else:
            self.whole += count


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="sdxl_ambient.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", metavar="PATH", nargs="+")
    options = parser.parse_args(argv)
    return run_command("sdxl_ambient.verify", lambda: _verify([Path(path) for path in options.paths]))


def _verify(paths: list[Path]) -> int:
    findings = Findings()
    for path in paths:
        if not path.exists():
            raise StageError(f"{path} is not there")
        _look(path, findings)
    for line in findings.damaged:
        print(f"DAMAGED  {line}")
    if findings.unknown:
        names = ", ".join(map(str, findings.unknown[:_SHOWN])) + (" …" if len(findings.unknown) > _SHOWN else "")
        print(f"{len(findings.unknown)} files have no checksum: {names}")
    if not findings.whole and not findings.damaged:
        raise StageError(f"{', '.join(map(str, paths))}: nothing in it has a checksum")
    print(f"{findings.whole} files are as they were written, {len(findings.damaged)} are damaged or missing")
    return 2 if findings.damaged else 0


def _look(path: Path, findings: Findings) -> None:
    """Check a file, or a folder: as a store or a checkpoint where it is one, else file by file."""
    # Here for start-up time: --help needs no torch.
    from sdxl_ambient.formats.record import STATE_FILE
    from sdxl_ambient.store.reader import LatentStore
    from sdxl_ambient.training.checkpoint import check_checkpoint

    if path.is_file():
        _look_at_file(path, findings)
    elif (path / "plan.json").is_file():
        findings.check(path, len(list(path.glob("*.*"))), lambda: LatentStore(path).verify())
    elif (path / STATE_FILE).is_file():
        findings.check(path, len([p for p in path.rglob("*") if p.is_file()]), lambda: check_checkpoint(path))
    else:
        drawn = list(_drawn(path, findings))
        for inner in sorted(path.iterdir()):
            if not inner.name.startswith(".") and inner not in drawn and not inner.is_symlink():
                _look(inner, findings)


def _drawn(folder: Path, findings: Findings) -> Iterator[Path]:
    """The files that a folder of drawn images names with their hashes; each is checked."""
    from sdxl_ambient.provenance import hash_file, parse_json

    rows = folder / "metadata.jsonl"
    if not (folder / "manifest.json").is_file() or not rows.is_file():
        return

    def listed() -> dict[str, str]:
        found = [parse_json(line, str(rows)) for line in rows.read_bytes().splitlines() if line.strip()]
        return {row["file_name"]: row["sha256"] for row in found if "sha256" in row}

    def as_drawn(name: str, wanted: str) -> None:
        if hash_file(folder / name) != wanted:
            raise StageError(f"{folder / name} is not as it was drawn")

    hashes: dict[str, str] = {}
    findings.check(rows, 1, lambda: hashes.update(listed()))
    for name, wanted in hashes.items():
        findings.check(folder / name, 1, lambda name=name, wanted=wanted: as_drawn(name, wanted))
    yield rows
    if hashes:
        yield folder / "images"


def _look_at_file(path: Path, findings: Findings) -> None:
    from sdxl_ambient.formats.files import check_hash
    from sdxl_ambient.provenance import CHECKSUM, read_json, read_sealed
    from sdxl_ambient.store.shards import check_shard, has_hashes, header_hashes

    def sealed() -> bool:
        value = read_json(path)
        return isinstance(value, dict) and CHECKSUM in value

    if path.suffix == ".json":
        findings.check(path, 1, lambda: sealed() and bool(read_sealed(path)))
    elif path.suffix == ".safetensors":
        findings.check(path, 1, lambda: check_shard(path, header_hashes(path)) if has_hashes(path) else check_hash(path))
    elif path.suffix.lower() in (".png", ".jpg", ".jpeg", ".html", ".md", ".txt", ".yaml"):
        findings.unknown.append(path)


if __name__ == "__main__":
    raise SystemExit(main())
