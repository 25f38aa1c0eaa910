"""Invariant 8: time ids carry the size and the crop that the stored latent really has."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from support.plans import plan_of

from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.images.load import load_rgb
from sdxl_ambient.models.conditioning import time_ids

SIZES = {"china.jpg": (427, 640), "coffee.png": (400, 600), "flower.jpg": (640, 427)}  # height, width as seen


@pytest.fixture(scope="module")
def pipe(miniature):
    return StableDiffusionXLPipeline.from_pretrained(miniature, add_watermarker=False)


def test_time_ids_are_the_stock_pipelines(pipe):
    sizes = (427, 640), (3, 17), (64, 64)
    want = pipe._get_add_time_ids(
        *sizes, torch.float32, text_encoder_projection_dim=pipe.text_encoder_2.config.projection_dim
    )
    assert time_ids(*sizes) == want[0].tolist() == [427, 640, 3, 17, 64, 64]


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
