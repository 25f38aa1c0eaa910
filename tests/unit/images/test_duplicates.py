"""One picture in two guises is found, two pictures that look alike to a grey hash are not; and what a store does then."""

import json

import imagehash
import numpy as np
import pytest
from accelerate import PartialState
from PIL import Image, ImageOps
from skimage import data
from support.stores import snapshot

from eval.controls import jpeg
from eval.duplicates import drop_near_duplicates, drop_near_embeddings, jpeg_limit
from eval.images import read_folder
from sdxl_ambient.errors import StoreError
from sdxl_ambient.images.duplicates import Fingerprints, earlier_twins, fingerprint, matches
from sdxl_ambient.images.load import list_images, load_rgb
from sdxl_ambient.store.deduplicate import handle_near_duplicates
from sdxl_ambient.store.scan import scan, scan_image_with_hash


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


@pytest.fixture
def album(tmp_path):
    """Two photographs, and further guises of the first: b (an exact copy), c (JPEG) and d (mirrored)."""
    images = tmp_path / "album"
    images.mkdir()
    rocket, coffee = (p.resize((80, 64)) for p in (photographs()["rocket"], photographs()["coffee"]))
    guises = {"a": rocket, "b": rocket, "c": jpeg(rocket, 60), "d": ImageOps.mirror(rocket), "e": coffee}
    for i, (name, picture) in enumerate(guises.items()):
        picture.save(images / f"{name}.png", compress_level=i)
        (images / f"{name}.txt").write_text(f"caption {name}")
    return images


def settled(images, policy, said=None):
    pictures, _ = scan(list_images(images), None, PartialState(), scan_image_with_hash)
    log = [].append if said is None else said.append
    kept, dropped, found = handle_near_duplicates(pictures, policy, PartialState(), log)
    return [p.record.name for p in kept], dropped, found


def test_near_duplicates_are_reported_dropped_refused_or_ignored(album):
    said = []
    kept, dropped, found = settled(album, "report", said)
    assert len(kept) == 5 and not dropped
    assert [(t["file"], t["shows"], t["mirrored"]) for t in found] == [("c.png", "a.png", False), ("d.png", "a.png", True)]
    assert said[0] == "note: 1 files are exact copies, the first is b.png of a.png; each picture is drawn once"
    assert said[1].startswith("note: 2 images show another one again; two noisy latents of one picture tell more of it")
    assert said[2:] == ["  c.png: near-duplicate of a.png", "  d.png: near-duplicate of a.png (mirrored)"]
    kept, dropped, _ = settled(album, "drop")
    assert kept == ["a.png", "b.png", "e.png"]  # an exact copy shares its draw
    assert dropped == [
        {"file": "c.png", "reason": "near-duplicate of a.png"},
        {"file": "d.png", "reason": "near-duplicate of a.png (mirrored)"},
    ]
    with pytest.raises(
        StoreError, match="--near_duplicates refuse: 2 images show another one again, the first is c.png: near"
    ):
        settled(album, "refuse")
    for name in "cd":
        (album / f"{name}.png").unlink()
    with pytest.raises(StoreError, match="--near_duplicates refuse: 1 files are exact copies, the first is b.png of a.png"):
        settled(album, "refuse")


def test_they_may_be_ignored(album):
    assert settled(album, "ignore") == (["a.png", "b.png", "c.png", "d.png", "e.png"], [], None)


def test_the_first_in_the_order_of_the_files_stays_with_its_copies(album):
    (album / "c.png").rename(album / "Z.png")  # before a in that order
    (album / "c.txt").rename(album / "Z.txt")
    kept, dropped, _ = settled(album, "drop")
    assert kept == ["Z.png", "e.png"] and [d["file"] for d in dropped] == ["a.png", "b.png", "d.png"]
    assert {d["reason"] for d in dropped} == {"near-duplicate of Z.png", "near-duplicate of Z.png (mirrored)"}


def test_no_more_than_twenty_are_printed(album):
    for i in range(25):
        jpeg(Image.open(album / "a.png"), 41 + 2 * i).save(album / f"x{i:02d}.png")
        (album / f"x{i:02d}.txt").write_text("a caption")
    said = []
    _, _, found = settled(album, "report", said)
    assert len(found) == 27 and len(said) == 23 and said[-1] == "  … and 7 more, all listed in manifest.json"


def test_a_store_tells_what_was_found_and_refuses_to_lose_pictures(album, build, tmp_path):
    store = tmp_path / "stores" / "s"
    with pytest.raises(StoreError, match="--near_duplicates refuse: 2 images"):
        build(album, store, near_duplicates="refuse")
    assert not store.exists()
    manifest = build(album, store)
    assert manifest["counts"]["images"] == 4 and [t["file"] for t in manifest["near_duplicates"]] == ["c.png", "d.png"]
    assert json.loads((store / "manifest.json").read_text())["near_duplicates"] == manifest["near_duplicates"]
    before = snapshot(store)
    with pytest.raises(StoreError, match="images: 0 are not in the store, 2 are in the store only"):
        build(album, store, near_duplicates="drop")
    assert snapshot(store) == before
    assert build(album, store, near_duplicates="ignore")["near_duplicates"] is None
    manifest = build(album, tmp_path / "other" / "s", near_duplicates="drop")
    assert manifest["counts"] == {**manifest["counts"], "files": 5, "images": 2, "exact_duplicates": 1, "skipped": 2}
    assert [s["reason"] for s in manifest["skipped"]] == ["near-duplicate of a.png", "near-duplicate of a.png (mirrored)"]
