"""A similarity is the best over the views of a training picture; shapes are made equal before."""

import numpy as np
import pytest
from PIL import Image, ImageOps
from skimage import data as photographs

from eval.embedders.registry import load_embedder
from eval.embedding import embed
from eval.images import read_folder
from eval.reporting.references import ReferenceSets
from eval.views import VIEWS, aspect_of, centre_crop, differs, fit, through

NAMES = ("astronaut", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field")


def pictures(size):
    return [Image.fromarray(getattr(photographs, name)()).convert("RGB").resize(size) for name in NAMES]


@pytest.fixture
def train(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    for name, picture in zip(NAMES, pictures((120, 80)), strict=True):
        picture.save(folder / f"{name}.png")
    return read_folder(folder)


def test_shapes_are_cropped_to_that_of_the_samples():
    wide = Image.new("RGB", (120, 80))
    assert fit(wide, 1.0).size == (80, 80) and fit(wide, 1.5).size == (120, 80)
    assert fit(Image.new("RGB", (80, 120)), 1.0).size == (80, 80)
    assert fit(wide, 1.47) is wide  # within five hundredths it is one shape
    left = np.asarray(fit(Image.fromarray(np.arange(120, dtype=np.uint8)[None].repeat(80, 0)), 1.0))
    assert (left[0, 0], left[0, -1]) == (20, 99)


def test_the_samples_shape_is_their_most_frequent_one(train, tmp_path):
    assert aspect_of([train]) == 1.5 and aspect_of([]) == 1.0
    assert not differs(train, 1.5) and differs(train, 1.0)


@pytest.mark.parametrize("change", ["mirrored", "middle", "middle, mirrored", "as sampled"])
def test_each_view_is_found_as_the_picture_itself(train, tmp_path, change):
    """Square samples of 3:2 pictures: mirrored, or cropped once more, each is nearest to its own picture, and as near."""
    embedder = load_embedder("pixel")
    crop = (lambda image: fit(image, 1.0),)
    views = {"as sampled": crop, **{f"as sampled, {name}": (*crop, view) for name, view in VIEWS.items()}}
    made = {
        name: embed(train, through(embedder, name, *transforms), tmp_path / "cache").embeddings
        for name, transforms in views.items()
    }
    plain = embed(train, embedder, tmp_path / "cache")
    sets, bare = ReferenceSets(plain, None, None, None, views=made), ReferenceSets(plain, None, None, None)
    changes = {"mirrored": ImageOps.mirror, "middle": centre_crop, "as sampled": lambda image: image}
    changes["middle, mirrored"] = lambda image: ImageOps.mirror(centre_crop(image))
    queries = [changes[change](fit(Image.open(record.path), 1.0)) for record in train.records]
    features = np.stack([embedder.encode(embedder.prepare(picture)[None]).numpy()[0] for picture in queries])
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    similarities, indices = sets.nearest_in_train(features)
    assert indices.tolist() == list(range(len(train))) and similarities.min() > 0.98
    assert bare.nearest_in_train(features)[0].mean() < similarities.mean() - 0.05


def test_a_view_has_a_cache_of_its_own(tmp_path):
    embedder = load_embedder("pixel")
    keys = {through(embedder, name, view).key for name, view in VIEWS.items()}
    assert len(keys | {embedder.key}) == len(VIEWS) + 1
