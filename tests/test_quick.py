"""The evaluation's fast path: planted copies are found, held-out images are not, and the sets are embedded once."""

import shutil

import pytest
from conftest import REPOSITORY, copy_emoji

from eval.quick import QuickLook
from sdxl_ambient.config import OptionError

DATA = REPOSITORY / "miniature/data"


@pytest.fixture(scope="module")
def look(tmp_path_factory):
    return QuickLook(str(DATA / "finetune"), str(DATA / "heldout"), tmp_path_factory.mktemp("look"), "pixel")


def test_copies_are_found(look, tmp_path):
    drawn = copy_emoji(tmp_path / "drawn", 12)
    (drawn / "metadata.jsonl").unlink()
    found = look(drawn)
    assert found["share_above_threshold"] == 1.0 and found["n_generated"] == 12
    low, high = found["excess_interval"]
    assert low <= found["excess_over_heldout"] <= high and found["excess_over_heldout"] > 0.8


def test_other_images_are_not(look, tmp_path):
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    for path in sorted((DATA / "heldout").glob("*.png"))[:24]:
        shutil.copy(path, drawn)
    look.prepare()
    references = look.references
    found = look(drawn)
    assert found["share_above_threshold"] < 0.2 and look.references is references


def test_too_few_held_out_images_are_said_before_training(tmp_path):
    heldout = copy_emoji(tmp_path / "heldout", 6, "heldout")
    look = QuickLook(str(DATA / "finetune"), str(heldout), tmp_path / "work", "pixel")
    with pytest.raises(OptionError, match="--memorization_every: "):
        look.prepare()
