"""What a store does with pictures that show another one again: report, drop, refuse or ignore them."""

import json

import pytest
from accelerate import PartialState
from PIL import Image, ImageOps
from skimage import data
from support.stores import equal, latents_in

from eval.controls import jpeg
from sdxl_ambient.errors import StoreError
from sdxl_ambient.images.load import list_images
from sdxl_ambient.store.deduplicate import handle_near_duplicates
from sdxl_ambient.store.scan import scan, scan_image_with_hash


def photographs():
    return {name: Image.fromarray(getattr(data, name)()).convert("RGB") for name in ("astronaut", "cat", "coffee", "rocket")}


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
    assert build(album, store, near_duplicates="ignore")["near_duplicates"] is None
    before, said = latents_in(store), []
    assert build(album, store, near_duplicates="drop", log=said.append)["counts"]["images"] == 2
    assert any("0 images are new and 2 are gone" in line for line in said)
    assert build(album, store)["counts"]["images"] == 4 and equal(latents_in(store), before)
    manifest = build(album, tmp_path / "other" / "s", near_duplicates="drop")
    assert manifest["counts"] == {**manifest["counts"], "files": 5, "images": 2, "exact_duplicates": 1, "skipped": 2}
    assert [s["reason"] for s in manifest["skipped"]] == ["near-duplicate of a.png", "near-duplicate of a.png (mirrored)"]
