"""Where the mask attack cuts its hole, and what it is painted over with."""

import numpy as np
import pytest
from PIL import Image

from eval.attacks.inpaint import hole, painted_over
from sdxl_ambient.errors import StageError


def test_the_hole_is_in_the_middle_and_on_the_grid_of_latents():
    assert hole(1024, 0.5, 8) == (256, 256, 768, 768)
    assert hole(64, 0.5, 4) == (16, 16, 48, 48)
    assert hole(64, 0.3, 4) == (20, 20, 40, 40)  # 4.8 of 16 latents: 5
    assert hole(64, 0.001, 4) == (28, 28, 32, 32) and hole(64, 0.999, 4) == (4, 4, 60, 60)
    with pytest.raises(StageError, match="2 × 2 latents has no place"):
        hole(16, 0.5, 8)


def test_a_hole_is_painted_over_with_the_colour_around_it():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[1:7, 1:7] = (10, 20, 30)
    pixels[2:6, 2:6] = 255
    expected = pixels.copy()
    expected[2:6, 2:6] = (10, 20, 30)
    assert np.array_equal(painted_over(Image.fromarray(pixels), (2, 2, 6, 6)), expected)
