"""One picture in two guises is found, two pictures that look alike to a grey hash are not; and what a store does then."""

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageOps
from skimage import data

from eval.controls import jpeg
from eval.duplicates import drop_near_duplicates, drop_near_embeddings, jpeg_limit
from eval.images import read_folder
from sdxl_ambient.images.duplicates import Fingerprints, earlier_twins, fingerprint, matches
from sdxl_ambient.images.load import load_rgb


def photographs():
    return {name: Image.fromarray(getattr(data, name)()).convert("RGB") for name in ("astronaut", "cat", "coffee", "rocket")}


def fingerprints(images):
    return Fingerprints.of(np.stack([fingerprint(load_rgb(record.path)) for record in images.records]))


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
    assert matches(one, other) == matches(one, other, pairs=1) == [(0, 3, mirrored)]
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


def test_a_fingerprint_survives_as_features(tmp_path):
    """Hash and thumbnail through bytes in float32 are what the library gives."""
    picture = photographs()["cat"]
    features = fingerprint(picture)[None]
    norm = np.linalg.norm(features)
    prints = Fingerprints.of((features / norm).astype(np.float32) * norm)  # what a cache of normalised features does
    for side, view in enumerate((picture, ImageOps.mirror(picture))):
        assert int(prints.hashes[0, side]) == int(str(imagehash.phash(view)), 16)
        thumbnail = np.asarray(view.resize((8, 8), Image.Resampling.BOX), np.float32).ravel() / 255
        np.testing.assert_array_equal(prints.thumbnails[0, side], thumbnail)


def test_images_as_near_as_a_jpeg_copy_are_one_picture(tmp_path):
    """By embedding: the earlier of a set stays, and whatever shows an image of the other set goes."""
    images = folder(
        tmp_path / "a", {name: Image.new("RGB", (9, 9), c) for name, c in [("a", "red"), ("b", "blue"), ("c", "tan")]}
    )
    others = folder(tmp_path / "b", {"x": Image.new("RGB", (9, 9), "white")})
    angles = np.array([0.0, 1.0, 0.01])
    embeddings = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    kept = drop_near_embeddings(images, embeddings, 0.99)
    assert [kept.name(i) for i in range(len(kept))] == ["a.png", "b.png"]
    assert kept.excluded[0]["reason"].startswith("near-duplicate of a.png (similarity 0.9999")
    theirs = np.array([[np.cos(1.02), np.sin(1.02)]], np.float32)
    kept = drop_near_embeddings(images, embeddings, 0.99, others, theirs)
    assert [kept.name(i) for i in range(len(kept))] == ["a.png"]
    assert "x.png of" in kept.excluded[0]["reason"]


def test_the_limit_is_half_of_the_jpeg_copies_and_never_low():
    assert jpeg_limit(np.array([0.97, 0.98, 0.99])) == pytest.approx(0.98)
    assert jpeg_limit(np.array([0.1, 0.2, 0.3])) == 0.95


# -- in a set that is trained on ---------------------------------------------------------------------------------


def chain(*hashes):
    """Fingerprints of grey pictures with these hashes, none of them like its mirror image."""
    both = np.array([[h, h ^ (2**64 - 1)] for h in hashes], np.uint64)
    return Fingerprints(both, np.zeros((len(hashes), 2, 192), np.float32))


def test_each_picture_is_named_once_with_the_first_that_it_shows():
    # a ~ b ~ c, but a and c differ in 8 bits; d is like all but a; e is like none.
    prints = chain(0, 0b1111, 0b11111111, 0b111111, 2**63 + 2**40 * 0b1111111)
    for pairs in (1, 1 << 24):
        assert [(i, j) for i, j, _ in matches(prints, prints, pairs) if j < i] == [(1, 0), (2, 1), (3, 1), (3, 2)]
    assert list(earlier_twins(prints)) == [(1, 0, False), (2, 1, False), (3, 1, False)]
    # Where b goes, c shows nothing that stays; d shows c.
    assert list(earlier_twins(prints, kept_only=True)) == [(1, 0, False), (3, 2, False)]


def test_a_set_of_copies_takes_no_more_memory_than_a_set_of_others():
    """Of each picture one twin is kept, not all pairs: here they would be half a million."""
    same = Fingerprints(np.zeros((1000, 2), np.uint64), np.zeros((1000, 2, 192), np.float32))
    assert list(earlier_twins(same)) == [(i, 0, False) for i in range(1, 1000)]
