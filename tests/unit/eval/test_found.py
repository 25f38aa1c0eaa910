"""Copies are found without a threshold: by bytes, pixels and fingerprint; and so many by chance are told from them."""

import math
import shutil

import numpy as np
import pytest
from PIL import Image, ImageOps
from skimage import data as photographs

from eval.embedders.registry import load_embedder
from eval.embedding import embed
from eval.found import FILE, MIRRORED, NEAR, PIXELS, KnownPictures, chance, contained
from eval.images import read_folder
from sdxl_ambient.images.duplicates import Fingerprints


@pytest.fixture
def known(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        Image.fromarray(getattr(photographs, name)()).resize((96, 80)).save(folder / f"{name}.png")
    return look_at(folder, tmp_path)


def look_at(folder, tmp_path):
    images = read_folder(folder)
    prints = embed(images, load_embedder("fingerprint"), tmp_path / "cache")
    return KnownPictures(images, prints.images, Fingerprints.of(prints.features))


def test_each_kind_is_named_with_its_training_image(known, tmp_path):
    train, folder = known.files.folder, tmp_path / "generated"
    folder.mkdir()
    shutil.copy(train / "rocket.png", folder / "a.png")
    coffee = Image.open(train / "coffee.png")
    coffee.save(folder / "b.bmp")
    coffee.save(folder / "c.jpg", quality=85)
    ImageOps.mirror(Image.open(train / "chelsea.png")).save(folder / "d.png")
    Image.open(train / "astronaut.png").resize((48, 40)).save(folder / "e.png")
    Image.fromarray(photographs.retina()).resize((96, 80)).save(folder / "f.png")
    drawn = look_at(folder, tmp_path)
    found = known.find(drawn.images, drawn.prints)
    wanted = {"a.png": ("rocket", FILE), "b.bmp": ("coffee", PIXELS), "c.jpg": ("coffee", NEAR)}
    wanted |= {"d.png": ("chelsea", MIRRORED), "e.png": ("astronaut", NEAR)}
    assert {name: (copy["train"].removesuffix(".png"), copy["kind"]) for name, copy in found.items()} == wanted
    section = contained(list(found.values()), 6, known)
    assert (section["same_file"], section["same_pixels"], section["near_duplicates"], section["certain"]) == (1, 1, 3, 2)
    assert section["near_duplicates_p_value"] is None  # without held-out images nothing says how many are chance


def test_one_of_two_thousand_is_found(known, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(2000):
        Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:04d}.png")
    shutil.copy(known.files.folder / "coffee.png", folder / "1234.png")
    drawn = look_at(folder, tmp_path)
    assert list(known.find(drawn.images, drawn.prints)) == ["1234.png"]


def test_the_chance_of_so_many_is_fishers():
    """5 of 20 beside 1 of 30, by hand: P(X ≥ 5) with 6 of 50 drawn 20 times without replacement."""
    wanted = sum(math.comb(20, k) * math.comb(30, 6 - k) for k in (5, 6)) / math.comb(50, 6)
    assert chance(5, 20, 1, 30) == pytest.approx(wanted, rel=1e-9)
    assert chance(0, 20, 0, 30) == pytest.approx(1)
    assert chance(3, 20, 1, 0) is None
