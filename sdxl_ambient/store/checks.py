"""Whether the stores of a run fit each other and the base model, and the notes that a run prints of them."""

from __future__ import annotations

from collections.abc import Iterable

from sdxl_ambient.errors import StoreError
from sdxl_ambient.levels import CLEAN
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.store.lineage import format_levels
from sdxl_ambient.store.reader import LatentStore


def levels_of(store: LatentStore) -> list[int]:
    """The noise levels of a store's pictures, lowest first, −1 for clean."""
    return sorted({CLEAN if i["t_n"] is None else i["t_n"] for i in store.manifest["images"]})


def common_t_n(store: LatentStore) -> int | str | None:
    """The store's noise level; None for clean, "mixed" where images have different ones."""
    return _common([i["t_n"] for i in store.manifest["images"]])


def observed_t_n(store: LatentStore) -> int | str | None:
    """The same of the observations that the store's latents are, or were restored from."""
    return _common(store.observed.values())


def _common(levels: Iterable[int | None]) -> int | str | None:
    distinct = set(levels)
    return "mixed" if len(distinct) > 1 else next(iter(distinct))


def format_store_levels(store: LatentStore) -> str:
    """The store's noise levels, as a message names them."""
    return format_levels(i["t_n"] for i in store.manifest["images"])


def check_stores(
    store: LatentStore, heldout: LatentStore | None, schedule: NoiseSchedule, low_noise: str = "skip"
) -> list[str]:
    """The base model's schedule must be the one that the stores were made with, held-out images must be at levels that
    training has, and there must be levels below t_n for what ``low_noise`` does there. Returns notes to print, of restored
    samples among them.

    Raises:
        StoreError: naming what is wrong.
    """
    trained = levels_of(store)
    if low_noise != "skip" and trained == [CLEAN]:
        raise StoreError(f"--low_noise: {low_noise!r} has nothing to do, {store.folder} holds clean latents; use skip")
    for one in filter(None, (store, heldout)):
        if one.schedule_hash != schedule.hash:
            raise StoreError(f"the store {one.folder} was made with another noise schedule than the base model's")
    if low_noise == "clean" and store.lineage:
        raise StoreError(f"--low_noise: 'clean' needs observations, {store.folder} holds restored samples; use skip")
    notes = restored_notes(store, heldout)
    if heldout is None or levels_of(heldout) == trained:
        return notes
    difference = (
        f"{heldout.folder} is at t_n = {format_store_levels(heldout)}, {store.folder} at {format_store_levels(store)}"
    )
    seen = levels_of(heldout)
    if seen[0] < trained[0] or seen[-1] > trained[-1]:
        raise StoreError(difference)
    return [*notes, f"note: {difference}; the held-out loss is that of its own levels"]


def restored_notes(store: LatentStore, heldout: LatentStore | None) -> list[str]:
    """Notes on stores of restored samples; none on observations."""
    notes = []
    if store.lineage:
        images = store.manifest["images"]
        drawn = [i for i in images if i["t_n"] != store.observed[i["content"]]]
        levels = format_levels(i["t_n"] for i in drawn)
        observed = format_levels(store.observed[i["content"]] for i in drawn)
        promise = f"what protects the images stays what t_n = {observed} promises"
        if any(a_round["foreign_model"] for a_round in store.lineage):
            promise = "a model that may have seen more of the images drew them, so no t_n says what protects those"
        notes.append(
            f"note: {len(drawn)} of {len(images)} images of {store.folder} are restored samples at t_n = {levels}, drawn "
            f"by a model from observations at t_n = {observed}: not observations, and {promise}"
        )
    if heldout is not None and bool(heldout.lineage) != bool(store.lineage):
        which = (store, heldout) if store.lineage else (heldout, store)
        notes.append(
            f"note: {which[0].folder} holds restored samples and {which[1].folder} observations, so that their losses "
            "differ by more than what was memorised"
        )
    return notes
