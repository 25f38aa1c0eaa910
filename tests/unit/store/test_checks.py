"""Whether the stores of a run fit each other, and how their levels are named."""

import pytest

from sdxl_ambient.errors import StoreError
from sdxl_ambient.store.checks import check_stores, common_t_n, format_store_levels
from sdxl_ambient.store.reader import LatentStore


def with_levels(store, *levels) -> LatentStore:
    data = LatentStore(store)
    data.manifest["images"] = [{**i, "t_n": t} for i, t in zip(data.manifest["images"], levels, strict=False)]
    return data


def test_levels_of_a_store_are_told(store):
    assert common_t_n(with_levels(store, None, None)) is None and format_store_levels(with_levels(store, None)) == "none"
    assert common_t_n(with_levels(store, 300)) == 300 and format_store_levels(with_levels(store, 300)) == "300"
    mixed = with_levels(store, 500, None, 0, 500)
    assert common_t_n(mixed) == "mixed" and format_store_levels(mixed) == "none, 0, 500"
    assert format_store_levels(with_levels(store, *range(100, 160, 10))) == "100 to 150 (6 levels)"


def test_heldout_images_are_at_levels_that_training_has(store, schedule):
    def check(heldout, *trained):
        return check_stores(with_levels(store, *trained), with_levels(store, *heldout), schedule)

    assert check([500], 500) == [] == check([500, None], None, 500)
    (note,) = check([500], None, 500)
    assert "is at t_n = 500, " in note and note.endswith("at none, 500; the held-out loss is that of its own levels")
    assert len(check([350, 400], 300, 500)) == 1
    for heldout, trained in (([300], [500]), ([None], [500]), ([500], [None]), ([400, 600], [300, 500])):
        with pytest.raises(StoreError, match="is at t_n = "):
            check(heldout, *trained)


def test_low_levels_need_one_noisy_picture(store, schedule):
    for low_noise in ("consistency", "restore"):
        check_stores(with_levels(store, None, 500), None, schedule, low_noise)
        with pytest.raises(StoreError, match="holds clean latents; use skip"):
            check_stores(with_levels(store, None, None), None, schedule, low_noise)
