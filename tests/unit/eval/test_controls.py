"""Positive controls: what is done to training images, and what the similarity makes of it."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from skimage import data
from support.pictures import copy_emoji

from eval.controls import MOST, TRANSFORMS, centre_crop, planted, vae_round_trip
from eval.embedders.registry import load_embedder
from eval.embedding import embed_images
from eval.images import read_folder


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    for name in ("astronaut", "cat", "coffee", "rocket"):
        ImageOps.fit(Image.fromarray(getattr(data, name)()), (300, 300)).save(root / f"{name}.png")
    return embed_images(read_folder(root), load_embedder("pixel"), root / "cache")


def test_transforms_do_what_they_are_called():
    pixels = np.arange(20 * 40 * 3, dtype=np.uint8).reshape(20, 40, 3)
    picture = Image.fromarray(pixels)
    assert np.array_equal(np.asarray(TRANSFORMS["copy"](picture)), pixels)
    assert np.array_equal(np.asarray(TRANSFORMS["flip"](picture)), pixels[:, ::-1])
    assert np.array_equal(np.asarray(centre_crop(picture)), pixels[1:19, 2:38])
    assert TRANSFORMS["jpeg"](picture).size == (40, 20)


def test_a_copy_is_found_exactly_and_a_mirror_image_is_not(train):
    found = planted(train, load_embedder("pixel"), TRANSFORMS, batch_size=3)
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(TRANSFORMS, 4)
    np.testing.assert_allclose(found["copy"], 1, atol=1e-6)
    assert found["jpeg"].min() > 0.999 and found["crop"].min() > 0.7
    assert found["flip"].max() < 0.95  # pixels have no idea of mirror images; the report says so by a low recall


def test_the_vae_is_gone_through_at_the_models_size(miniature, tmp_path):
    vae = AutoencoderKL.from_pretrained(miniature / "vae", torch_dtype=torch.float32)
    through = vae_round_trip(vae, 64)
    assert through(Image.fromarray(data.coffee())).size == (64, 64)
    emoji = embed_images(read_folder(copy_emoji(tmp_path / "emoji", 6)), load_embedder("pixel"), tmp_path / "cache")
    found = planted(emoji, load_embedder("pixel"), {"vae": through})
    assert 0.9 < found["vae"].min() < found["vae"].max() < 0.99999


def test_large_sets_give_a_sample_from_all_over(train, monkeypatch):
    monkeypatch.setattr("eval.controls.MOST", 2)
    found = planted(train, load_embedder("pixel"), {"copy": TRANSFORMS["copy"]})
    assert len(found["copy"]) == 2 and MOST == 256
