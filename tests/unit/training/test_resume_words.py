"""Every option does on resume what its word says: the same value, applied and named, or free."""

import json
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
from support.pictures import copy_emoji
from support.running import arguments, train_here

from sdxl_ambient.config.parser import APPLIED, FREE, SAME
from sdxl_ambient.config.reference import option_table
from sdxl_ambient.config.settings import settings_of
from sdxl_ambient.config.training import TrainOptions
from sdxl_ambient.provenance import differences
from sdxl_ambient.training.record import lora_record, run_record
from sdxl_ambient.training.resume import changed_options
from sdxl_ambient.training.settings import applied_options, run_record_settings
from sdxl_ambient.training.weights import WeightSettings

OPTIONS = {field.name: field for field in fields(TrainOptions)}
# Compared by the store, whose hash is in the record, or by what the run makes of them, which tests of their own change.
BY_THE_STORE = {"pre_noised", "resolution", "aspect_ratio_buckets", "bucket_reso_steps", "center_crop", "t_n"}
BY_THE_RUN = {"clean_batch_size", "mixed_precision"}


def of_word(word):
    return [name for name, field in OPTIONS.items() if field.metadata["resume"] == word]


def another(name, value):
    """Another value of an option."""
    choices = OPTIONS[name].metadata["choices"]
    if choices:
        return next(choice for choice in choices if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + 1
    return [*value, "x=1"] if isinstance(value, list) else 7 if value is None else f"{value}x"


def record_of(options):
    """What a checkpoint keeps of a run with these options."""
    weights = {"finetune": options.finetune, **lora_record(settings_of(WeightSettings, options))}
    samples = options.train_batch_size * options.gradient_accumulation_steps
    store = SimpleNamespace(hash="of the data", public_lineage=[])
    return run_record(run_record_settings(options), store, samples, weights)


def test_every_option_has_one_word_and_says_it():
    assert {field.metadata["resume"] for field in OPTIONS.values()} == {SAME, APPLIED, FREE}
    table = option_table()
    for name, field in OPTIONS.items():
        (row,) = [line for line in table.splitlines() if line.startswith(f"| `--{name}` |")]
        assert row.split(" | ")[2] == field.metadata["resume"], name


@pytest.mark.parametrize("name", sorted(set(of_word(SAME)) - BY_THE_STORE - BY_THE_RUN))
def test_another_value_of_a_same_option_is_another_run(name):
    """In the branch of ``--low_noise`` that the option belongs to."""
    found = []
    for low_noise in ("restore", "clean", "consistency"):
        options = TrainOptions(low_noise=low_noise, use_ema=True)
        changed = replace(options, **{name: another(name, getattr(options, name))})
        found += differences(record_of(options), record_of(changed))
    assert found and all("stored" in one and "wanted" in one for one in found)


@pytest.mark.parametrize("name", of_word(FREE) + of_word(APPLIED))
def test_another_value_of_another_option_is_the_same_run(name):
    if name in ("train_batch_size", "aspect_ratio_buckets"):
        return  # the samples of a step stay the same, whatever they are made of
    options = TrainOptions(low_noise="restore")
    changed = replace(options, **{name: another(name, getattr(options, name))})
    assert differences(record_of(options), record_of(changed)) == []


@pytest.mark.parametrize("name", of_word(APPLIED))
def test_another_value_of_an_applied_option_is_named(name):
    before, value = applied_options(TrainOptions()), another(name, getattr(TrainOptions(), name))
    assert set(before) == set(of_word(APPLIED))
    (line,) = changed_options(json.loads(json.dumps(before)), {**before, name: value})
    assert line == f"note: --{name} is {value} from here on; it was {before[name]}"
    assert changed_options({}, before) == []  # an earlier version recorded none


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of a run, and its arguments."""
    folder = tmp_path_factory.mktemp("run")
    emoji = copy_emoji(folder / "emoji", 6)
    common = dict(max_train_steps=2, checkpointing_steps=2, report_to="none")
    assert train_here(arguments(emoji, folder / "out", **common)) == 0

    def again(**changes):
        return train_here(arguments(emoji, folder / "out", **{**common, "resume_from_checkpoint": "latest", **changes}))

    again.output = folder / "out"
    return again


REFUSED = {
    "learning_rate": 3e-4, "adam_beta1": 0.5, "adam_weight_decay": 0.5, "lr_scheduler": "linear", "lr_warmup_steps": 7,
    "max_grad_norm": 0.5, "seed": 9, "gradient_accumulation_steps": 2, "mixed_precision": "bf16", "t_n": 300,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_refuses_another_value_with_both(run, name, capsys):
    before = (run.output / "options.json").read_bytes()
    assert run(**{name: REFUSED[name]}) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert name in error and "stored" in error and "wanted" in error
    assert (run.output / "options.json").read_bytes() == before  # of what is in force


def test_a_run_names_what_it_applies(run, capsys):
    assert run(max_train_steps=3, max_skipped_steps=77) == 0
    said = capsys.readouterr().out
    assert "note: --max_train_steps is 3 from here on; it was 2" in said
    assert "note: --max_skipped_steps is 77 from here on; it was" in said
    options = json.loads((run.output / "options.json").read_text())["options"]
    assert options["max_train_steps"] == 3 and options["learning_rate"] == 1e-3
