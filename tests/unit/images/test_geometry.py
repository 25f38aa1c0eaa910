"""Which size a picture is cropped to, where, and what its mirror image's time ids are."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sdxl_ambient.errors import OptionError
from sdxl_ambient.images.geometry import SDXL_BUCKETS, Geometry, bucket_counts, mirrored, parse_buckets, resized
from sdxl_ambient.images.load import load_rgb
from sdxl_ambient.models.conditioning import time_ids

NAMES = ("china.jpg", "coffee.png", "flower.jpg")  # 427 × 640, 400 × 600, 640 × 427


def some_sizes(count: int) -> list[tuple[int, int]]:
    draw = random.Random(0)
    return [(round(8 * 300 ** draw.random()), round(8 * 300 ** draw.random())) for _ in range(count)]


# -- the target -------------------------------------------------------------------------------------------------


def test_without_buckets_the_target_is_the_square():
    assert {Geometry(64).target(size) for size in some_sizes(20)} == {(64, 64)} == set(Geometry(64).targets)


def test_the_target_has_the_nearest_aspect_ratio():
    geometry = Geometry(1024, buckets=SDXL_BUCKETS)
    for size in some_sizes(300):
        apart = {b: abs(math.log(size[0] / size[1]) - math.log(b[0] / b[1])) for b in SDXL_BUCKETS}
        assert apart[geometry.target(size)] == pytest.approx(min(apart.values()), abs=1e-12)
    assert geometry.target((400, 600)) == (832, 1216) and geometry.target((600, 400)) == (1216, 832)
    # 0.55 is nearer to 1 than to 1/4 as a ratio, though not as a number.
    assert Geometry(64, buckets=((64, 256), (64, 64))).target((55, 100)) == (64, 64)
    assert geometry.target((10, 1000)) == (512, 2048) and geometry.target((3, 3)) == (1024, 1024)


def test_ties_go_to_the_larger_area_and_then_to_the_first():
    """A square is as far from 1:2 as from 2:1; 2:4 is the same shape as 1:2."""
    small, large, upright = (64, 128), (128, 256), (128, 64)
    assert Geometry(64, buckets=(small, large)).target((300, 600)) == large
    assert Geometry(64, buckets=(small, large)).target((77, 77)) == large
    assert Geometry(64, buckets=(small, upright)).target((77, 77)) == small
    assert Geometry(64, buckets=(upright, small)).target((77, 77)) == upright


# -- the crop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [True, False])
def test_squares_are_what_they_were_before_there_were_buckets(center):
    """The formula of the first stores; another one would give their pictures another crop."""
    for size in some_sizes(300):
        scale = 64 / min(size)
        want = tuple(max(64, round(side * scale)) for side in size)
        got, (top, left) = Geometry(64, center).place(size, "ab" * 32)
        assert got == want == resized(size, (64, 64))
        assert not center or (top, left) == ((want[0] - 64) // 2, (want[1] - 64) // 2)
    golden = [Geometry(64, False).place((64, 128), bytes([i] * 32).hex())[1] for i in range(4)]
    assert golden == [(0, 37), (0, 2), (0, 46), (0, 30)]


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("buckets", [(), SDXL_BUCKETS])
def test_the_resized_picture_just_covers_its_target(center, buckets):
    geometry = Geometry(1024, center, buckets)
    for size in some_sizes(200):
        target = geometry.target(size)
        got, (top, left) = geometry.place(size, "cd" * 32)
        assert all(side >= want for side, want in zip(got, target, strict=True))
        assert any(side == want for side, want in zip(got, target, strict=True))
        assert 0 <= top <= got[0] - target[0] and 0 <= left <= got[1] - target[1]
        # Its shape stays: both sides are scaled alike, up to one pixel's rounding.
        scale = max(want / side for side, want in zip(size, target, strict=True))
        assert all(abs(side * scale - new) <= 1 for side, new in zip(size, got, strict=True))


@pytest.mark.parametrize("center", [True, False])
def test_pixels_are_those_of_the_place_also_in_the_mirror(photographs, center):
    """Real photographs: the crop that is recorded, and the one that the mirrored pixels have in the mirrored picture."""
    geometry = Geometry(64, center, ((64, 64), (48, 80), (80, 48)))
    content = "5e" * 32
    for name in NAMES:
        image = load_rgb(photographs / name)
        size = image.height, image.width
        target = geometry.target(size)
        assert target == ((80, 48) if name == "flower.jpg" else (48, 80))
        pixels, (top, left) = geometry.apply(image, content)
        assert pixels.shape == (3, *target) and pixels.is_contiguous()
        height, width = resized(size, target)
        full = image.resize((width, height), Image.Resampling.LANCZOS)

        def cut(picture, left, top=top, target=target):
            part = np.asarray(picture)[top : top + target[0], left : left + target[1]]
            return torch.from_numpy(part / np.float32(127.5) - 1).permute(2, 0, 1)

        assert torch.equal(pixels, cut(full, left))
        ids = time_ids(size, (top, left), target)
        other = mirrored(ids)
        assert torch.equal(pixels.flip(-1), cut(ImageOps.mirror(full), other[3]))
        assert other[:3] == ids[:3] and other[4:] == ids[4:] and mirrored(other) == ids


def test_the_mirror_of_a_crop_that_covered_nothing_starts_at_zero():
    """Noisy latents of another program may come with a crop that ours would not have made."""
    assert mirrored([64, 64, 0, 90, 64, 64]) == [64, 64, 0, 0, 64, 64]


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


# -- the list of sizes ------------------------------------------------------------------------------------------


def test_automatic_buckets_of_sdxl_are_the_published_ones():
    assert parse_buckets(None, 1024, 64) == () and parse_buckets("auto", 1024, 64) == SDXL_BUCKETS
    assert len(set(SDXL_BUCKETS)) == 40 and (1024, 1024) in SDXL_BUCKETS
    assert all(h % 64 == w % 64 == 0 and 0.25 <= h / w <= 4 and 0.87 < h * w / 1024**2 <= 1 for h, w in SDXL_BUCKETS)
    ratios = [round(h / w, 2) for h, w in SDXL_BUCKETS]
    assert ratios == sorted(set(ratios)) and ratios[:6] == [0.25, 0.26, 0.27, 0.28, 0.32, 0.33]
    assert ratios[-6:] == [3.0, 3.11, 3.62, 3.75, 3.88, 4.0]


@pytest.mark.parametrize(("resolution", "step"), [(64, 16), (64, 32), (512, 64), (768, 64), (1024, 32)])
def test_automatic_buckets_are_the_largest_of_their_shapes(resolution, step):
    sizes = parse_buckets("AUTO ", resolution, step)
    assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)
    for h, w in sizes:
        assert h % step == w % step == 0 and 0.25 <= h / w <= 4 and h * w <= resolution**2
        assert min(h, w) * (max(h, w) + step) > resolution**2 or (min(h, w) + step) * max(h, w) > resolution**2
    ratios = [h / w for h, w in sizes]
    assert ratios == sorted(ratios)


def test_the_miniatures_automatic_buckets():
    assert parse_buckets("auto", 64, 32) == ((32, 128), (32, 96), (64, 64), (96, 32), (128, 32))


def test_sizes_can_be_given():
    assert parse_buckets("512,768; 768, 512 ;640,640", 64, 64) == ((512, 768), (768, 512), (640, 640))


@pytest.mark.parametrize(
    ("text", "step", "message"),
    [
        ("", 64, "--aspect_ratio_buckets: '' is not a size; allowed is 'h,w;h,w' or auto"),
        ("512", 64, "--aspect_ratio_buckets: '512' is not a size; allowed is 'h,w;h,w' or auto"),
        ("512,512;", 64, "--aspect_ratio_buckets: '' is not a size; allowed is 'h,w;h,w' or auto"),
        ("64x64", 64, "--aspect_ratio_buckets: '64x64' is not a size; allowed is 'h,w;h,w' or auto"),
        ("64,-64", 64, "--aspect_ratio_buckets: '64,-64' is not a size; allowed is 'h,w;h,w' or auto"),
        ("64,0", 64, "--aspect_ratio_buckets: '64,0' is not a size; allowed is 'h,w;h,w' or auto"),
        ("64,64,3", 64, "--aspect_ratio_buckets: '64,64,3' is not a size; allowed is 'h,w;h,w' or auto"),
        ("64,64;60,64", 64, "--aspect_ratio_buckets: '60,64' has a side that is not a multiple of 8"),
        ("64,64;32,64; 64, 64", 64, "--aspect_ratio_buckets: '64, 64' is given twice"),
        ("auto", 12, "--bucket_reso_steps: 12 is not a multiple of 8"),
        ("auto", 48, "--bucket_reso_steps: 48 does not divide --resolution 64"),
        ("auto", 128, "--bucket_reso_steps: 128 does not divide --resolution 64"),
    ],
)
def test_wrong_sizes_are_named(text, step, message):
    with pytest.raises(OptionError) as error:
        parse_buckets(text, 64, step)
    assert str(error.value) == message


def test_buckets_are_counted_from_a_manifest():
    images = [{"time_ids": [9, 9, 0, 0, *size]} for size in ((64, 32), (32, 64), (64, 32))]
    assert list(bucket_counts(images).items()) == [((32, 64), 1), ((64, 32), 2)]
