"""The evaluation's fast path: planted copies are found, held-out images are not, and the sets are embedded once."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.pictures import REPOSITORY, copy_emoji
from support.running import arguments, launch

from eval.embedders.registry import load_embedder
from eval.embedding import embed
from eval.evaluation import evaluate
from eval.images import read_folder
from eval.options import MemorizationOptions
from eval.quick import QuickLook, _InMemory, check_quick
from eval.settings import evaluation_settings
from sdxl_ambient.errors import OptionError
from sdxl_ambient.images.captions import Columns

DATA = REPOSITORY / "miniature/data"


@pytest.fixture(scope="module")
def look(tmp_path_factory):
    return QuickLook(str(DATA / "finetune"), str(DATA / "heldout"), tmp_path_factory.mktemp("look"), "pixel")


def test_copies_are_found(look, tmp_path):
    drawn = copy_emoji(tmp_path / "drawn", 12)
    (drawn / "metadata.jsonl").unlink()
    found = look(drawn)
    assert found["share_above_threshold"] == 1.0 and found["n_generated"] == 12
    low, high = found["excess_interval"]
    assert low <= found["excess_over_heldout"] <= high and found["excess_over_heldout"] > 0.8


def test_other_images_are_not(look, tmp_path):
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    for path in sorted((DATA / "heldout").glob("*.png"))[:24]:
        shutil.copy(path, drawn)
    look.prepare()
    references = look.references
    found = look(drawn)
    assert found["share_above_threshold"] < 0.2 and look.references is references


def test_too_few_held_out_images_are_said_before_training(tmp_path):
    heldout = copy_emoji(tmp_path / "heldout", 6, "heldout")
    look = QuickLook(str(DATA / "finetune"), str(heldout), tmp_path / "work", "pixel")
    with pytest.raises(OptionError, match="--memorization_every: "):
        look.prepare()


def test_the_evaluation_says_the_same(look, tmp_path):
    drawn = copy_emoji(tmp_path / "drawn", 12)
    for path in sorted((DATA / "heldout").glob("*.png"))[:12]:
        shutil.copy(path, drawn)
    (drawn / "metadata.jsonl").unlink()
    options = MemorizationOptions(
        train_data_dir=str(DATA / "finetune"), heldout_data_dir=str(DATA / "heldout"), output_dir=str(tmp_path / "out"),
        generated_dir=[f"drawn={drawn}"], embedder="pixel",
    )  # fmt: skip
    options.validate()
    report = evaluate(evaluation_settings(options))
    whole, found = report["models"]["drawn"]["samplers"]["given"], look(drawn)
    assert found.pop("threshold") == report["threshold"]["value"]
    assert found == {name: whole[name] for name in found} and 0 < found["share_above_threshold"] < 1


def test_embeddings_are_the_caches_and_stay_in_memory(look, tmp_path):
    images = read_folder(DATA / "heldout").thinned(10)
    for embedder in (load_embedder("pixel"), load_embedder("fingerprint")):
        found, cached = _InMemory(look.settings)(images, embedder), embed(images, embedder, tmp_path / "cache")
        assert np.array_equal(found.embeddings, cached.embeddings) and np.array_equal(found.norms, cached.norms)
    look.prepare()
    assert not list(Path(look.settings.output_dir).iterdir())


def test_images_that_cannot_be_used_are_left_out(look, tmp_path):
    drawn = copy_emoji(tmp_path / "drawn", 3)
    (drawn / "00.png").write_bytes(b"not an image")
    assert look(drawn)["n_generated"] == 3


def test_captions_may_have_another_name(tmp_path):
    train = copy_emoji(tmp_path / "train", 6)
    rows = [json.loads(line) for line in (train / "metadata.jsonl").read_text().splitlines()]
    rows = [{"file_name": r["file_name"], "words": r["text"]} for r in rows]
    (train / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    heldout = tmp_path / "heldout"
    heldout.mkdir()
    for path in sorted((DATA / "heldout").glob("*.png")):
        shutil.copy(path, heldout)
    look = QuickLook(str(train), str(heldout), tmp_path / "work", "pixel", columns=Columns("words"))
    look.prepare()
    assert look.references.threshold is not None


def test_near_duplicates_are_no_held_out_images(tmp_path):
    heldout = copy_emoji(tmp_path / "heldout", 45, "heldout")
    for path in sorted(heldout.glob("*.png"))[:10]:
        with Image.open(path) as image:
            rgb = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
            rgb.save(heldout / f"again-{path.stem}.jpg", quality=95)
    look = QuickLook(str(DATA / "finetune"), str(heldout), tmp_path / "work", "pixel")
    with pytest.raises(OptionError, match="at least 49 are needed"):
        look.prepare()


@pytest.mark.parametrize(("alpha", "needed"), [(0.02, 49), (0.1, 9)])
def test_how_many_held_out_images_are_needed(alpha, needed):
    check_quick(needed, alpha)
    with pytest.raises(OptionError, match=f"{needed - 1} held-out images.*at least {needed} are needed"):
        check_quick(needed - 1, alpha)


def test_weights_that_are_not_there_are_one_line(tmp_path):
    with pytest.raises(OptionError, match="is not a folder"):
        QuickLook(str(DATA / "finetune"), str(DATA / "heldout"), tmp_path / "work", "dinov2=./nowhere")
    (tmp_path / "empty").mkdir()
    look = QuickLook(str(DATA / "finetune"), str(DATA / "heldout"), tmp_path / "work", f"dinov2={tmp_path / 'empty'}")
    with pytest.raises(OptionError, match="--memorization_every: .*dinov2 can't be loaded") as error:
        look.prepare()
    assert "\n" not in str(error.value)


def test_too_few_images_are_said_before_an_embedder_is_loaded(tmp_path):
    heldout = copy_emoji(tmp_path / "heldout", 6, "heldout")
    (tmp_path / "empty").mkdir()
    look = QuickLook(str(DATA / "finetune"), str(heldout), tmp_path / "work", f"dinov2={tmp_path / 'empty'}")
    with pytest.raises(OptionError, match="6 held-out images"):
        look.prepare()


@pytest.mark.slow
def test_one_of_two_processes_looks_while_the_other_waits(tmp_path):
    """What the evaluation shares over processes would wait here for one that is elsewhere in training."""
    changes = dict(
        heldout_data_dir=copy_emoji(tmp_path / "heldout", 60, "heldout"),
        heldout_samples=4,
        max_train_steps=2,
        train_batch_size=2,
        memorization_every=2,
        memorization_images=8,
        memorization_embedder="pixel",
        validation_inference_steps=2,
    )
    launch(arguments(copy_emoji(tmp_path / "emoji", 6), tmp_path / "run", **changes), processes=2)
    (look,) = json.loads((tmp_path / "run/memorization.json").read_text())["looks"]
    assert look["step"] == 2 and look["n_generated"] == 8 and look["threshold"] is not None
