"""What a run leaves: its artefacts in a form that can be compared, finished work, and every noisy latent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load

from sdxl_ambient.provenance import hash_bytes, hash_tensors

# Of a run and not of its result.
VOLATILE = {
    "checksum", "store_id", "environment", "versions", "seconds", "commit", "folder", "path", "since", "output_dir",
    "sha256", "files", "size", "process", "host",
}  # fmt: skip
_SKIPPED = (".html", ".svg", ".log")


def artefacts(out: Path) -> dict[str, Any]:
    """Every artefact below a folder by its name: tensors by their hash, JSON without what is of the run, bytes else."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if not path.is_file() or any(part.startswith(".") for part in Path(name).parts) or path.suffix in _SKIPPED:
            continue
        if "logs/" in name or path.name == "options.json":
            continue
        found[name] = _canonical(path)
    return found


def _canonical(path: Path) -> Any:
    data = path.read_bytes()
    try:
        if path.suffix == ".safetensors":
            return hash_tensors(load(data))
        if path.suffix == ".json":
            return _without(json.loads(data))
    except (SafetensorError, ValueError, RecursionError):
        pass
    return hash_bytes(data)


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without(v) for k, v in value.items() if k not in VOLATILE}
    return [_without(v) for v in value] if isinstance(value, list) else value


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names that two runs' artefacts differ in."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def noisy_latents(case: Path) -> dict[str, set[str]]:
    """Hashes of every x_n in any shard of latents below a folder, hidden and temporary ones too, by picture and store."""
    found: dict[str, set[str]] = {}
    for path in case.rglob("*latents-*"):
        if not path.is_file() or path.suffix == ".json" or path.is_relative_to(case / "store"):
            continue
        try:
            tensors = load(path.read_bytes())
        except SafetensorError:
            continue
        for content, x_n in tensors.items():
            if "clean" not in path.parent.name:
                found.setdefault(content, set()).add(hash_tensors({"x": x_n}))
    return found


def finished(out: Path) -> dict[str, str]:
    """Hashes of what stays for good once it is there: shards, images, and checkpoints by their record."""
    patterns = ("**/latents-*.safetensors", "**/images/*.png", "checkpoint-*/checkpoint.json")
    return {p.relative_to(out).as_posix(): hash_bytes(p.read_bytes()) for pattern in patterns for p in out.glob(pattern)}
