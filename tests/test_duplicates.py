"""One picture in two guises is found, two pictures that look alike to a grey hash are not."""

import numpy as np
import pytest
from PIL import Image, ImageOps
from skimage import data

from eval.controls import jpeg
from eval.duplicates import drop_near_duplicates, fingerprints, matches
from eval.images import read_folder


def photographs():
    return {name: Image.fromarray(getattr(data, name)()).convert("RGB") for name in ("astronaut", "cat", "coffee", "rocket")}


def folder(root, pictures):
    root.mkdir()
    for name, picture in pictures.items():
        picture.save(root / f"{name}.png")
    return read_folder(root)


@pytest.mark.parametrize(
    ("change", "mirrored"),
    [
        (lambda p: p.resize((p.width // 2, p.height // 2), Image.Resampling.LANCZOS), False),
        (lambda p: jpeg(p, 50), False),
        (ImageOps.mirror, True),
        (lambda p: ImageOps.mirror(jpeg(p, 50)), True),
    ],
)
def test_changed_copies_are_found_in_another_set(tmp_path, change, mirrored):
    train = folder(tmp_path / "train", photographs())
    colony = Image.fromarray(data.immunohistochemistry())
    heldout = folder(tmp_path / "heldout", {"new": colony, "cat2": change(photographs()["rocket"])})
    one, other = fingerprints(heldout), fingerprints(train)
    assert matches(one, other) == matches(one, other, chunk=1) == [(0, 3, mirrored)]
    kept = drop_near_duplicates(heldout, one, train, other)
    assert [kept.name(i) for i in range(len(kept))] == ["new.png"]
    (row,) = kept.excluded
    assert row["file"] == "cat2.png" and "rocket.png" in row["reason"] and ("(mirrored)" in row["reason"]) == mirrored


def test_the_first_of_a_set_is_kept_and_different_pictures_all_are(tmp_path):
    pictures = photographs()
    more = {"zz_cat": jpeg(pictures["cat"]), "zzz_cat": ImageOps.mirror(pictures["cat"])}
    images = folder(tmp_path / "a", pictures | more)
    kept = drop_near_duplicates(images, fingerprints(images))
    assert [kept.name(i) for i in range(len(kept))] == ["astronaut.png", "cat.png", "coffee.png", "rocket.png"]
    assert all("near-duplicate of cat.png" in row["reason"] for row in kept.excluded) and len(kept.excluded) == 2


def test_colours_tell_pictures_of_one_shape_apart(tmp_path):
    """Flags of three stripes have one grey shape; their perceptual hashes are equal or nearly so."""

    def flag(*colours):
        return Image.fromarray(np.repeat(np.array(colours, np.uint8)[None], 60, 0).repeat(30, 1))

    flags = {"a": flag((0, 0, 160), (255, 255, 255), (200, 0, 0)), "b": flag((0, 90, 0), (255, 255, 255), (200, 60, 0))}
    images = folder(tmp_path / "a", flags)
    prints = fingerprints(images)
    assert np.bitwise_count(prints.hashes[0, 0] ^ prints.hashes[1, 0]) <= 4
    assert len(drop_near_duplicates(images, prints)) == 2


def test_files_that_are_no_pictures_are_left_to_the_next_stage(tmp_path):
    images = folder(tmp_path / "a", photographs())
    (tmp_path / "a/broken.png").write_bytes(b"not a picture")
    images = read_folder(tmp_path / "a")
    prints = fingerprints(images)
    assert len(prints.index) == 4 and len(drop_near_duplicates(images, prints)) == 5
