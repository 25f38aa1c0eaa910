"""What is looked at between training steps: with the real miniature, its weights as they are before training."""

import json

import pytest
import torch
from accelerate import Accelerator
from support.pictures import REPOSITORY, copy_emoji

from eval.quick import QuickLook
from sdxl_ambient.config.settings import settings_of
from sdxl_ambient.config.training import TrainOptions
from sdxl_ambient.errors import OptionError
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.models.base import load_schedule
from sdxl_ambient.store.build import build_store
from sdxl_ambient.store.reader import LatentStore
from sdxl_ambient.store.settings import StoreSettings
from sdxl_ambient.training.model import load_trainable
from sdxl_ambient.training.settings import validation_settings
from sdxl_ambient.training.validation import Validation, _spread
from sdxl_ambient.training.weights import BaseModel, WeightSettings

DATA = REPOSITORY / "miniature/data"


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def told(output, **changes):
    """Options of a short run."""
    given = {
        "pretrained_model_name_or_path": str(REPOSITORY / "miniature/pipeline"),
        "train_data_dir": str(DATA / "finetune"),
        "output_dir": str(output),
        "resolution": 64,
        "rank": 2,
        "validation_steps": 2,
        "validation_inference_steps": 3,
        "num_validation_images": 1,
        "train_batch_size": 4,
        "heldout_bands": 2,
        "report_to": "none",
    }
    options = TrainOptions(**{**given, **changes})
    options.validate()
    return options


@pytest.fixture(scope="module")
def trainable(accelerator, tmp_path_factory):
    options = told(tmp_path_factory.mktemp("trainee"))
    base, weights = settings_of(BaseModel, options), settings_of(WeightSettings, options)
    return load_trainable(base, weights, accelerator, load_schedule(options.pretrained_model_name_or_path), True)


@pytest.fixture(scope="module")
def stores(tmp_path_factory, encoders, schedule):
    """Noisy latents of six pictures, and of four that were held out."""
    folder = tmp_path_factory.mktemp("stores")
    for split, count in (("finetune", 6), ("heldout", 4)):
        images = copy_emoji(folder / "emoji" / split, count, split)
        build_store(images, folder / split, encoders, schedule, StoreSettings(Geometry(64)), log=lambda message: None)
    return folder


@pytest.fixture
def store(stores):
    return LatentStore(stores / "finetune")


@pytest.fixture
def heldout(stores):
    return LatentStore(stores / "heldout")


def validation(accelerator, trainable, schedule, store, heldout, output, quick=None, **changes):
    if heldout is not None:
        changes["heldout_latents_dir"] = str(heldout.folder)
    return Validation(validation_settings(told(output, **changes)), accelerator, trainable, schedule, store, heldout, quick)


# -- samplers ----------------------------------------------------------------------


def test_the_level_is_the_stores_own(accelerator, trainable, schedule, build, emoji, tmp_path):
    build(emoji, tmp_path / "store", t_n=300)
    found = validation(accelerator, trainable, schedule, LatentStore(tmp_path / "store"), None, tmp_path / "run")
    assert found.settings.drawing.t_n == 500 and found.drawing.settings.t_n == 300


def test_of_several_levels_it_is_the_lowest(accelerator, trainable, schedule, build, emoji, tmp_path):
    rows = [json.loads(line) for line in (emoji / "metadata.jsonl").read_text().splitlines()]
    for lowest, samplers in ((300, ["hybrid"]), (-1, ["full"])):
        levels = [700, lowest, 500, 700, 700, 700]
        lines = [json.dumps({**row, "level": level}) for row, level in zip(rows, levels, strict=True)]
        (emoji / "metadata.jsonl").write_text("\n".join(lines))
        folder = tmp_path / f"store{lowest}"
        build(emoji, folder, t_n_column="level", allow_second_observation=True)  # the other one is no more than a test's
        found = validation(accelerator, trainable, schedule, LatentStore(folder), None, tmp_path / "run")
        assert found.drawing.settings.t_n == (None if lowest == -1 else lowest) and found.samplers == samplers


def test_a_sampler_that_would_draw_nothing_is_refused_at_once(accelerator, trainable, schedule, build, emoji, tmp_path):
    build(emoji, tmp_path / "store", t_n=990)
    given = (accelerator, trainable, schedule, LatentStore(tmp_path / "store"), None, tmp_path / "run")
    with pytest.raises(OptionError, match="--validation_sampler: 'hybrid' begins at timestep .* above t_n = 990"):
        validation(*given, validation_prompt=["cat"])
    validation(*given)  # nothing is drawn
    validation(*given, validation_prompt=["cat"], validation_sampler=["full"])
    more = dict(heldout_data_dir=str(DATA / "heldout"), memorization_every=2)
    with pytest.raises(OptionError, match="--memorization_every: 'hybrid' begins"):
        validation(*given, **more)


def test_clean_latents_have_no_level_to_stop_at(accelerator, trainable, schedule, build, emoji, tmp_path):
    build(emoji, tmp_path / "store", t_n=None)
    given = (accelerator, trainable, schedule, LatentStore(tmp_path / "store"), None, tmp_path / "run")
    assert validation(*given, validation_prompt=["cat"]).samplers == ["full"]
    with pytest.raises(OptionError, match="'early_stop' needs a noise level"):
        validation(*given, validation_prompt=["cat"], validation_sampler=["early_stop"])


# -- what is left behind ----------------------------------------------------------------------


def never(folder, step):
    raise AssertionError(f"nothing is better after step {step}")


def test_every_sampler_draws_what_it_drew_before(accelerator, trainable, schedule, store, tmp_path):
    samplers = ["auto", "hybrid", "full", "early_stop"]
    found = validation(
        accelerator,
        trainable,
        schedule,
        store,
        None,
        tmp_path,
        validation_prompt=["cat", "dog"],
        validation_sampler=samplers,
    )
    for step in (2, 4):
        assert found.due(step, False) and found.run(trainable.unet, step, False, never) is None
    assert trainable.unet.training and not found.due(3, False)
    one, two = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*.png")} for f in sorted(tmp_path.glob("validation/*")))
    assert one == two and len(one) == 3 * 2 and len(set(one.values())) == len(one)
    assert {str(p.parent) for p in one} == {"hybrid", "full", "early_stop"}


def test_images_and_losses_reach_the_tracker(trainable, schedule, store, heldout, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path / "logs"))
    accelerator.init_trackers("watched")
    found = validation(accelerator, trainable, schedule, store, heldout, tmp_path / "run", validation_prompt=["cat"])
    found.begin(trainable.unet)
    found.run(trainable.unet, 2, False, lambda folder, step: None)
    accelerator.end_training()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    logged = EventAccumulator(str(file)).Reload()
    assert {"heldout_loss", "denoising_gap", "heldout_loss/501-749"} <= set(logged.Tags()["scalars"])
    assert logged.Tags()["images"] == ["hybrid: cat"]


def test_best_weights_are_exported_once_and_patience_ends(accelerator, trainable, schedule, store, heldout, tmp_path):
    exported = []
    found = validation(accelerator, trainable, schedule, store, heldout, tmp_path, early_stopping=1)
    found.begin(trainable.unet)
    reasons = [found.run(trainable.unet, s, False, lambda folder, step: exported.append((folder, step))) for s in (2, 4)]
    assert exported == [(tmp_path / "best", 2)]
    assert reasons[0] is None and "has not fallen for 1 validations" in reasons[1]
    record = json.loads((tmp_path / "heldout_loss.json").read_text())
    # Weights that did not move are no better on either set.
    assert [r["step"] for r in record["losses"]] == [2, 4] and record["best"][0] == 2
    assert all(r["gap"] == {"value": 0, "standard_error": 0} for r in record["losses"])
    assert found.run(trainable.unet, 6, True, never) is None  # the last step ends anyway


def test_a_resume_goes_on_counting(accelerator, trainable, schedule, store, heldout, tmp_path):
    given = (accelerator, trainable, schedule, store, heldout, tmp_path)
    first = validation(*given, early_stopping=2)
    first.begin(trainable.unet)
    for step in (2, 4):
        first.run(trainable.unet, step, False, lambda folder, step: None)
    second = validation(*given, early_stopping=2)
    second.load_state_dict({"step": 4, **json.loads(json.dumps(first.state_dict()))})
    start = second.start
    second.begin(trainable.unet)
    assert second.start is start and torch.equal(start.heldout, first.start.heldout)
    assert "has not fallen for 2 validations" in second.run(trainable.unet, 6, False, never)


@pytest.mark.parametrize("changed", ["bands", "pictures", "store"])
def test_a_resume_with_other_losses_counts_anew(
    accelerator, trainable, schedule, store, heldout, build, tmp_path, capsys, changed
):
    first = validation(accelerator, trainable, schedule, store, heldout, tmp_path)
    first.begin(trainable.unet)
    first.run(trainable.unet, 2, False, lambda folder, step: None)
    if changed == "store":
        build(copy_emoji(tmp_path / "more", 4), tmp_path / "another")
        heldout = LatentStore(tmp_path / "another")
    changes = {"bands": {"heldout_bands": 3}, "pictures": {"heldout_samples": 2}, "store": {}}[changed]
    second = validation(accelerator, trainable, schedule, store, heldout, tmp_path, **changes)
    second.load_state_dict({"step": 2, **json.loads(json.dumps(first.state_dict()))})
    assert second.start is None and second.best is None and "before step 2" in capsys.readouterr().out
    second.begin(trainable.unet)
    exported = []
    second.run(trainable.unet, 4, False, lambda folder, step: exported.append(step))
    assert exported == [4]


def test_a_look_at_copies(accelerator, trainable, schedule, store, tmp_path):
    sets = (str(DATA / "finetune"), str(DATA / "heldout"))
    look = QuickLook(*sets, tmp_path / "work", "pixel")
    more = dict(heldout_data_dir=sets[1], memorization_every=3, memorization_images=8, validation_inference_steps=2)
    found = validation(accelerator, trainable, schedule, store, None, tmp_path / "run", look, **more)
    assert found.due(3, False)
    found.run(trainable.unet, 3, False, never)
    assert len(list((tmp_path / "run/memorization/step-000003").glob("*.png"))) == 8
    (record,) = json.loads((tmp_path / "run/memorization.json").read_text())["looks"]
    assert record["step"] == 3 and record["n_generated"] == 8 and record["share_above_threshold"] < 0.5
    assert found.state_dict()["memorization"] == [record]


@pytest.mark.parametrize(("count", "wanted", "expected"), [(6, 3, [0, 2, 4]), (2, 5, [0, 1, 0, 1, 0]), (3, 3, [0, 1, 2])])
def test_captions_are_taken_evenly(count, wanted, expected):
    assert _spread(list(range(count)), wanted) == expected
