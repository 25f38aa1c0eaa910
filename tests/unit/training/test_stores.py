"""Held-out pictures that are training pictures are found, in whatever form, before anything is drawn."""

import shutil

import pytest
from accelerate import PartialState
from PIL import Image, ImageOps
from skimage import data
from sklearn.datasets import load_sample_image

from sdxl_ambient.config.parser import build_options
from sdxl_ambient.config.training import TrainOptions
from sdxl_ambient.errors import OptionError, StoreError
from sdxl_ambient.store.reader import Presentation
from sdxl_ambient.training.settings import stores_settings
from sdxl_ambient.training.stores import open_stores

PHOTOGRAPHS = {
    "astronaut": data.astronaut(), "coffee": data.coffee(), "cat": data.chelsea(), "china": load_sample_image("china.jpg"),
    "flower": load_sample_image("flower.jpg"),
}  # fmt: skip


@pytest.fixture
def folders(tmp_path):
    """Three training photographs and two that are held out, in one tree."""
    for name, split in zip(PHOTOGRAPHS, ["train"] * 3 + ["heldout"] * 2, strict=True):
        (tmp_path / "set" / split).mkdir(parents=True, exist_ok=True)
        Image.fromarray(PHOTOGRAPHS[name]).save(tmp_path / "set" / split / f"{name}.png")
    return tmp_path / "set"


@pytest.fixture
def opened(folders, miniature, schedule, tmp_path):
    said = []

    class Speaker:
        """A process that remembers what it prints."""

        def __init__(self):
            self.state = PartialState()

        def __getattr__(self, name):
            return getattr(self.state, name)

        def print(self, *words):
            said.append(" ".join(map(str, words)))

    def run(**options):
        usual = {
            "pretrained_model_name_or_path": str(miniature), "output_dir": str(tmp_path / "run"), "resolution": 64,
            "train_data_dir": str(folders / "train"), "heldout_data_dir": str(folders / "heldout"), "instance_prompt": "a",
        }  # fmt: skip
        settings = stores_settings(build_options(TrainOptions, {**usual, **options}))
        return open_stores(settings, Speaker(), schedule, Presentation())

    run.said = said
    return run


def put(folders, form):
    """A training photograph among the held-out ones."""
    source, target = folders / "train/cat.png", folders / "heldout/other"
    image = Image.open(source)
    if form == "equal bytes":
        shutil.copy(source, target.with_suffix(".png"))
    elif form == "another file of the same pixels":
        image.save(target.with_suffix(".bmp"))
    elif form == "recompressed":
        image.save(target.with_suffix(".jpg"), quality=75)
    elif form == "resized":
        image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS).save(target.with_suffix(".png"))
    elif form == "mirrored":
        ImageOps.mirror(image).save(target.with_suffix(".png"))


EXACT = ["equal bytes", "another file of the same pixels"]
NEAR = ["recompressed", "resized", "mirrored"]


@pytest.mark.parametrize("t_n", [500, None])
@pytest.mark.parametrize("form", EXACT + NEAR)
def test_a_training_picture_among_the_held_out_is_left_out_reported_or_refused(folders, opened, tmp_path, form, t_n):
    put(folders, form)
    with pytest.raises(StoreError, match=r"refuse: 1 of 3 held-out images are training images, the first is other\.\w+: "):
        opened(near_duplicates="refuse", t_n=t_n)
    assert not list((tmp_path / "run").rglob("latents-*"))  # nothing was drawn
    _, heldout = opened(near_duplicates="drop", t_n=t_n)
    assert len(heldout) == 2 and heldout.manifest["ledger"]["left_out"] == 1
    (skipped,) = heldout.manifest["skipped"]
    assert skipped["file"].startswith("other.") and "cat.png" in skipped["reason"]
    _, heldout = opened(near_duplicates="report", t_n=t_n)
    assert len(heldout) == 3
    assert sum("1 of 3 held-out images are training images" in s and "--early_stopping means nothing" in s
               for s in opened.said) == 1  # fmt: skip


@pytest.mark.parametrize("form", EXACT)
def test_equal_pixels_are_found_though_near_duplicates_are_ignored(folders, opened, form):
    put(folders, form)
    opened(near_duplicates="ignore")
    assert any("1 of 3 held-out images are training images" in s for s in opened.said)


def test_a_held_out_folder_of_the_training_folder_is_found(folders, opened):
    with pytest.raises(StoreError, match="2 of 2 held-out images are training images"):
        opened(train_data_dir=str(folders), near_duplicates="refuse")
    with pytest.raises(StoreError, match="nothing is held out"):
        opened(train_data_dir=str(folders), near_duplicates="drop")


def test_stores_that_were_made_apart_are_compared(folders, opened):
    put(folders, "equal bytes")
    train, heldout = opened(near_duplicates="ignore")
    opened.said.clear()
    made = dict(latents_dir=str(train.folder), heldout_latents_dir=str(heldout.folder))
    opened(**made, train_data_dir=None, heldout_data_dir=None)
    assert any("1 of 3 held-out images in" in s for s in opened.said)
    with pytest.raises(StoreError, match="--near_duplicates refuse: 1 of 3"):
        opened(**made, train_data_dir=None, heldout_data_dir=None, near_duplicates="refuse")
    # Another store that is made beside, of clean latents, is no comparison.
    with pytest.raises(StoreError, match="--near_duplicates refuse: 1 of 3"):
        opened(**made, heldout_data_dir=None, near_duplicates="refuse", low_noise="clean")


def test_unlike_pictures_are_no_twins(opened):
    opened(near_duplicates="refuse")
    assert not any("held-out images are training images" in s for s in opened.said)


@pytest.mark.parametrize("inside", ["train", "heldout"])
def test_an_output_folder_among_the_images_is_refused(folders, opened, inside):
    output = folders / inside / "runs/mine"
    with pytest.raises(OptionError, match=rf"--output_dir: '.*' lies inside --{inside}_data_dir"):
        build_options(
            TrainOptions,
            dict(pretrained_model_name_or_path="x", train_data_dir=str(folders / "train"), output_dir=str(output),
                 heldout_data_dir=str(folders / "heldout")),
        )  # fmt: skip
    assert not output.exists()
