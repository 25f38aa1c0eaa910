"""What a folder or a plan says of its own origin: observations, or samples that a model restored from some.

A store that :mod:`sdxl_ambient.loop` made holds restored samples and says so: ``restored`` lists its rounds, and every entry
has the level that its picture was observed at, ``observed_t_n``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sdxl_ambient.errors import StoreError
from sdxl_ambient.levels import CLEAN
from sdxl_ambient.provenance import read_json


def is_store(folder: Path) -> bool:
    """Whether a folder is a store of noisy latents, finished or not, damaged or not."""
    if next(folder.glob("latents-*.safetensors"), None) is not None:
        return True
    for name in ("plan.json", "manifest.json"):
        try:
            if "latent" in read_json(folder / name)["fingerprint"]:
                return True
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not there, or not one of ours
    return False


# A store that sdxl_ambient.loop made holds samples that a model drew given noisy latents, and says so: ``restored`` is the
# chain of its rounds, and every entry has the level that its picture was observed at, ``observed_t_n``.


def rounds(plan: dict) -> list[dict]:
    """How a store's latents were restored, a link for each round, the oldest first; [] for observations."""
    return plan.get("restored") or []


def observed_levels(plan: dict) -> dict[str, int | None]:
    """The noise level of each picture's one observation, by content; None for clean. Restoring lowers none of them."""
    name = "observed_t_n" if rounds(plan) else "t_n"
    return {i["content"]: i[name] for i in plan["images"]}


def restored_levels(folder: Path) -> dict[str, int | None] | None:
    """:func:`observed_levels` of the store of restored samples that a folder is, finished or not; None for all others."""
    for name in ("plan.json", "manifest.json"):
        try:
            plan = read_json(folder / name)
            if rounds(plan):
                return observed_levels(plan)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not there, or not one of ours
    return None


def format_levels(levels: Iterable[int | None]) -> str:
    """Noise levels as a message names them, the lowest first."""
    found = sorted({CLEAN if t is None else t for t in levels})
    names = ["none" if t == CLEAN else str(t) for t in found]
    return ", ".join(names) if len(names) < 5 else f"{names[0]} to {names[-1]} ({len(names)} levels)"


def refuse_restored(option: str, folder: str | Path) -> None:
    """Raises StoreError where images or noisy latents are looked for in a store of restored samples."""
    found = restored_levels(Path(folder))
    if found is not None:
        raise StoreError(
            f"--{option}: {str(folder)!r} is a store of restored samples, drawn by a model from observations at t_n = "
            f"{format_levels(found.values())}, and no source of observations; train on it with --latents_dir"
        )
