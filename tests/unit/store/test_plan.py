"""Geometry of real photographs, and what a store's plan says. Its time ids: tests/invariants."""

import pytest
import torch
from accelerate import PartialState
from PIL import Image
from support.plans import MARKS, plan_of

from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.images.load import list_images, load_rgb
from sdxl_ambient.models.conditioning import encode_prompts
from sdxl_ambient.models.load import load_encoders
from sdxl_ambient.store.plan import fingerprint, make_plan, shards
from sdxl_ambient.store.scan import content_hash, scan
from sdxl_ambient.store.second_observation import compare


def test_crop_places_differ_between_pictures_and_stay(photographs):
    """Without a central crop, the place follows from the picture: the same for ever, and spread over all of them."""
    geometry = Geometry(64, center_crop=False)
    contents = [content_hash(Image.new("RGB", (8, 8), (i, 0, 0))) for i in range(200)]
    places = [geometry.place((64, 128), c) for c in contents]
    assert places == [geometry.place((64, 128), c) for c in contents]
    lefts = {left for _, (top, left) in places if top == 0}
    assert len(lefts) > 50 and min(lefts) < 5 and max(lefts) > 59 and max(lefts) <= 64
    assert {geometry.place((64, 65), c)[1] for c in contents} == {(0, 0), (0, 1)}


@pytest.mark.parametrize("size", [(64, 64), (63, 64), (1000, 8), (65, 64), (333, 777)])
def test_the_crop_always_fits(size):
    for center in (True, False):
        (height, width), (top, left) = Geometry(64, center).place(size, "ab" * 32)
        assert min(height, width) == 64 and 0 <= top <= height - 64 and 0 <= left <= width - 64


def test_pixels_are_in_range_and_upright():
    image = Image.new("RGB", (16, 16), (0, 127, 255))
    image.putpixel((15, 0), (255, 255, 255))
    pixels, _ = Geometry(16).apply(image, "00" * 32)
    assert pixels[:, 5, 5].tolist() == pytest.approx([-1, 127 / 127.5 - 1, 1])
    assert pixels[:, 0, 15].tolist() == [1, 1, 1] and pixels.dtype == torch.float32


def test_content_is_the_pixels_not_the_file(tmp_path, photographs):
    image = load_rgb(photographs / "coffee.png")
    image.save(tmp_path / "copy.png", compress_level=1, pnginfo=None)
    assert (tmp_path / "copy.png").read_bytes() != (photographs / "coffee.png").read_bytes()
    assert content_hash(load_rgb(tmp_path / "copy.png")) == content_hash(image)
    changed = image.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    assert content_hash(changed) != content_hash(image)
    flat = Image.new("RGB", (8, 16)), Image.new("RGB", (16, 8))
    assert content_hash(flat[0]) != content_hash(flat[1])


def test_the_plan_does_not_depend_on_the_order_of_the_pictures(photographs):
    pictures, _ = scan(list_images(photographs), None, PartialState())
    plans = [make_plan(MARKS, order, Geometry(64), 2) for order in (pictures, pictures[::-1])]
    assert plans[0] == plans[1]
    assert [len(entries) for _, entries in shards(plans[0])] == [2, 1]


def test_duplicates_are_one_image_with_all_captions(photographs, tmp_path):
    image = load_rgb(photographs / "coffee.png")
    for name, caption in (("a", "first"), ("b", "second"), ("c", "first")):
        image.save(tmp_path / f"{name}.png", compress_level=ord(name) - 96)
        (tmp_path / f"{name}.txt").write_text(caption)
    _, entries = plan_of(tmp_path, Geometry(64))
    (entry,) = entries.values()
    assert len(entry["captions"]) == 2


def test_pictures_without_a_caption_are_skipped_unless_there_is_a_prompt(photographs, tmp_path):
    load_rgb(photographs / "coffee.png").save(tmp_path / "a.png")
    found, skipped = scan(list_images(tmp_path), None, PartialState())
    assert not found and skipped[0]["file"] == "a.png" and skipped[0]["reason"].startswith("no caption")
    found, skipped = scan(list_images(tmp_path), "a cup", PartialState())
    assert found[0].caption == "a cup" and not skipped


def test_differences_are_named_but_captions_are_none():
    images = [{"content": c, "captions": ["x"], "t_n": 500} for c in "ab"]
    stored = {"fingerprint": MARKS, "images": images}
    assert compare(stored, {"fingerprint": MARKS, "images": [{**i, "captions": ["y"]} for i in images]}) == []
    wanted = {"fingerprint": {"latent": {"t_n": 300}, "text": {}}, "images": images[:1] + [{"content": "c", "t_n": 300}]}
    assert compare(stored, wanted) == [
        "latent.t_n: stored 500, wanted 300",
        "images: 1 are not in the store, 1 are in the store only",
    ]


def test_using_the_encoders_does_not_change_their_fingerprint(miniature, schedule):
    """Tokenizers remember the padding of their last call; a store made before it must still be the same store after."""
    fresh = load_encoders(str(miniature))
    before = fingerprint(fresh, schedule, Geometry(64), 500)
    encode_prompts(["penguin"], fresh.tokenizers, fresh.text_encoders)
    assert fingerprint(fresh, schedule, Geometry(64), 500) == before
    fresh.tokenizers[0].add_tokens(["newword"])
    assert fingerprint(fresh, schedule, Geometry(64), 500)["text"] != before["text"]
