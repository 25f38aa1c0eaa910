"""Geometry and time ids of real photographs (invariant 8), and what a store's plan says."""

import numpy as np
import pytest
from accelerate import PartialState
from PIL import Image

from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.images.load import list_images, load_rgb
from sdxl_ambient.models.conditioning import encode_prompts
from sdxl_ambient.models.load import load_encoders
from sdxl_ambient.store.plan import fingerprint, make_plan, shards
from sdxl_ambient.store.scan import content_hash, scan

MARKS = {"latent": {"t_n": 500}, "text": {}}
SIZES = {"china.jpg": (427, 640), "coffee.png": (400, 600), "flower.jpg": (640, 427)}  # height, width as seen


def plan_of(folder, geometry, shard_size=2):
    pictures, skipped = scan(list_images(folder), None, PartialState())
    assert not skipped
    return pictures, {i["content"]: i for i in make_plan(MARKS, pictures, geometry, shard_size)["images"]}


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("resolution", [64, 512, 800])
def test_time_ids_are_the_size_and_crop_that_the_pixels_have(photographs, resolution, center):
    """Smaller and larger than the pictures; one turned by EXIF; crops in the middle and elsewhere."""
    geometry = Geometry(resolution, center)
    pictures, entries = plan_of(photographs, geometry)
    for p in pictures:
        name = p.record.name
        image = load_rgb(p.record.path)
        *size, top, left, height, width = entries[p.content]["time_ids"]
        assert tuple(size) == SIZES[name] == (image.height, image.width)
        assert (height, width) == (resolution, resolution)
        # The whole picture, resized so that the shorter side is the resolution, cut at the place that is recorded.
        scale = resolution / min(size)
        full = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        want = np.asarray(full)[top : top + resolution, left : left + resolution]
        pixels, place = geometry.apply(image, p.content)
        assert place == (top, left) and pixels.shape == (3, resolution, resolution)
        got = ((pixels.permute(1, 2, 0) + 1) * 127.5).round().numpy()
        np.testing.assert_array_equal(got, want)
        free = full.height - resolution, full.width - resolution
        if center:
            assert (top, left) == (free[0] // 2, free[1] // 2)
        assert 0 in (top, left)  # one side fits exactly


def test_crop_places_differ_between_pictures_and_stay(photographs):
    """Without a central crop, the place follows from the picture: the same for ever, and spread over all of them."""
    geometry = Geometry(64, center_crop=False)
    contents = [content_hash(Image.new("RGB", (8, 8), (i, 0, 0))) for i in range(200)]
    places = [geometry.place((64, 128), c) for c in contents]
    assert places == [geometry.place((64, 128), c) for c in contents]
    lefts = {left for _, (top, left) in places if top == 0}
    assert len(lefts) > 50 and min(lefts) < 5 and max(lefts) > 59 and max(lefts) <= 64
    assert {geometry.place((64, 65), c)[1] for c in contents} == {(0, 0), (0, 1)}


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


def test_using_the_encoders_does_not_change_their_fingerprint(miniature, schedule):
    """Tokenizers remember the padding of their last call; a store made before it must still be the same store after."""
    fresh = load_encoders(str(miniature))
    before = fingerprint(fresh, schedule, Geometry(64), 500)
    encode_prompts(["penguin"], fresh.tokenizers, fresh.text_encoders)
    assert fingerprint(fresh, schedule, Geometry(64), 500) == before
    fresh.tokenizers[0].add_tokens(["newword"])
    assert fingerprint(fresh, schedule, Geometry(64), 500)["text"] != before["text"]
