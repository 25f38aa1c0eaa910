"""What a folder or a plan holds: observations, or samples that a model restored from some.

A store that :mod:`sdxl_ambient.loop` made holds restored samples and says so: ``restored`` is its lineage, a
:class:`Round` for each time that a model drew, the oldest first; and every entry has the level that its picture was observed
at, ``observed_t_n``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdxl_ambient.errors import StoreError
from sdxl_ambient.levels import CLEAN
from sdxl_ambient.provenance import read_json
from sdxl_ambient.store.records import Entry, Plan, Round

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)  # not there, or not one of ours


def is_store(folder: Path) -> bool:
    """Whether a folder is a store of noisy latents, finished or not, damaged or not."""
    if next(folder.glob("latents-*.safetensors"), None) is not None:
        return True
    for name in ("plan.json", "manifest.json"):
        try:
            if "latent" in read_json(folder / name)["fingerprint"]:
                return True
        except _UNREADABLE:
            continue
    return False


# -- a plan's lineage ------------------------------------------------------------------


def lineage_of(plan: Plan) -> list[Round]:
    """How a store's latents were restored, the oldest round first; [] for observations."""
    return plan.get("restored") or []


def public_lineage(lineage: Iterable[Round]) -> list[dict[str, Any]]:
    """A lineage as artefacts that are shared have it: without the key's id."""
    return [{name: value for name, value in a_round.items() if name != "key_id"} for a_round in lineage]


def first_observations(lineage: Sequence[Mapping[str, Any]], data: str | None) -> str | None:
    """The hash of the store of observations behind some data: the data itself, or the first parent of restored samples."""
    return lineage[0]["parent"] if lineage else data


def lowered(entry: Entry, t_n: int) -> bool:
    """Whether an image of a store is restored to ``t_n``: neither clean nor at or below it already."""
    return entry["t_n"] is not None and entry["t_n"] > t_n


# -- levels ------------------------------------------------------------------


def observed_levels(plan: Plan) -> dict[str, int | None]:
    """The noise level of each picture's one observation, by content; None for clean. Restoring lowers none of them."""
    restored = bool(lineage_of(plan))
    # Of a store of restored samples, an entry without its observed level is damaged: a KeyError.
    return {
        entry["content"]: entry["observed_t_n"] if restored else entry["t_n"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
        for entry in plan["images"]
    }


def restored_levels(folder: Path) -> dict[str, int | None] | None:
    """:func:`observed_levels` of the store of restored samples that a folder is, finished or not; None for all others."""
    for name in ("plan.json", "manifest.json"):
        try:
            plan: Plan = read_json(folder / name)
            if lineage_of(plan):
                return observed_levels(plan)
        except _UNREADABLE:
            continue
    return None


def format_levels(levels: Iterable[int | None]) -> str:
    """Noise levels as a message names them, the lowest first."""
    distinct = sorted({CLEAN if t is None else t for t in levels})
    names = ["none" if t == CLEAN else str(t) for t in distinct]
    return ", ".join(names) if len(names) < 5 else f"{names[0]} to {names[-1]} ({len(names)} levels)"


def refuse_restored(option: str, folder: str | Path) -> None:
    """Raises StoreError where images or noisy latents are looked for in a store of restored samples."""
    levels = restored_levels(Path(folder))
    if levels is not None:
        raise StoreError(
            f"--{option}: {str(folder)!r} is a store of restored samples, drawn by a model from observations at t_n = "
            f"{format_levels(levels.values())}, and no source of observations; train on it with --latents_dir"
        )
