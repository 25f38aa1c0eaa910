"""Copies of a part: what one homography carries over is found, and what it can't carry isn't."""

import numpy as np
import pytest
from PIL import Image, ImageOps
from skimage import data

from eval.keypoints import FLOOR, best_matches, detect, limit_of, verify

TRAIN = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in ("astronaut", "coffee", "chelsea", "rocket")]
UNRELATED = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in ("camera", "coins", "page", "retina")]


def _pasted(image: Image.Image) -> Image.Image:
    ground = Image.linear_gradient("L").resize(image.size).convert("RGB")
    ground.paste(image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS), (0, 0))
    return ground


CHANGES = {
    "unchanged": lambda image: image,
    "mirrored": ImageOps.mirror,
    "upside down": lambda image: image.rotate(180),
    "turned": lambda image: image.rotate(37, expand=True),
    "quarter": _pasted,
    "half": lambda image: image.crop((0, 0, image.width // 2, image.height)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_part_is_found_whatever_was_done_to_it(name):
    images = [CHANGES[name](image) for image in TRAIN]
    matches = best_matches(len(images), images.__getitem__, len(TRAIN), TRAIN.__getitem__)
    assert [match.index for match in matches] == list(range(len(TRAIN)))
    assert all(match.inliers > FLOOR for match in matches)
    assert all(match.mirrored == (name == "mirrored") for match in matches)


def test_unrelated_photographs_stay_below_the_floor():
    matches = best_matches(len(UNRELATED), UNRELATED.__getitem__, len(TRAIN), TRAIN.__getitem__)
    assert all(match.inliers <= FLOOR for match in matches)


def test_the_boxes_show_what_was_pasted():
    match = best_matches(1, lambda _: _pasted(TRAIN[0]), 1, TRAIN.__getitem__)[0]
    left, top, right, bottom = match.region
    assert right <= 0.52 and bottom <= 0.52
    assert np.allclose(np.array(match.region), np.array(match.train_region) / 2, atol=0.02)


def test_pictures_without_texture_match_nothing():
    plain = detect(Image.new("RGB", (64, 64), "green"))
    assert len(plain.points) == 0
    assert verify(plain, detect(TRAIN[0])).inliers == 0
    assert best_matches(1, lambda _: Image.new("RGB", (64, 64)), 1, lambda _: Image.new("RGB", (9, 999)))[0].index == -1


def test_the_limit_is_the_highest_of_the_null():
    """Of n + 1 exchangeable pictures each is the highest with a chance of 1/(n + 1): in all orders, exactly."""
    assert limit_of([]) == FLOOR and limit_of([3, 7]) == FLOOR and limit_of([3, FLOOR + 9]) == FLOOR + 9
    values = [FLOOR + k for k in range(1, 21)]
    over = [v > limit_of([w for w in values if w != v]) for v in values]
    assert sum(over) == 1
