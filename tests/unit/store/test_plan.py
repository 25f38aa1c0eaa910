"""Geometry of real photographs, and what a store's plan says. Its time ids: tests/invariants."""

from accelerate import PartialState
from PIL import Image
from support.plans import MARKS, plan_of

from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.images.load import list_images, load_rgb
from sdxl_ambient.models.conditioning import encode_prompts
from sdxl_ambient.models.load import load_encoders
from sdxl_ambient.store.plan import fingerprint, make_plan, place, shard_name, shard_number, shards
from sdxl_ambient.store.scan import content_hash, scan


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
    assert all("shard" not in entry for entry in plans[0]["images"])


def test_pictures_stay_in_their_shards_and_new_ones_get_new_shards(photographs):
    pictures, _ = scan(list_images(photographs), None, PartialState())
    entries = make_plan(MARKS, pictures, Geometry(64), 2)["images"]
    plan = {"images": place(entries, 2)}
    assert [(name, len(some)) for name, some in shards(plan)] == [(shard_name(0), 2), (shard_name(1), 1)]
    known = {entries[1]["content"]: shard_name(4)}
    grown = {"images": place(entries, 1, known, first=5)}
    assert [(name, [e["content"] for e in some]) for name, some in shards(grown)] == [
        (shard_name(4), [entries[1]["content"]]),
        (shard_name(5), [entries[0]["content"]]),
        (shard_name(6), [entries[2]["content"]]),
    ]
    assert shard_number(shard_name(123)) == 123 and shard_number("../latents-00001.safetensors") is None


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
