"""The options of encoding and training: documented, and checked against each other before anything is loaded."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from sdxl_ambient.config.data import LatentsOptions
from sdxl_ambient.config.parser import groups, load_options
from sdxl_ambient.config.reference import option_table
from sdxl_ambient.config.training import TrainOptions
from sdxl_ambient.errors import OptionError
from sdxl_ambient.option_table import main
from sdxl_ambient.training.settings import objective_settings

ROOT = Path(__file__).resolve().parents[3]


def base(tmp_path, *more):
    """A valid command line, with the flags in ``more`` added or in place of the usual ones."""
    data = tmp_path / "images"
    data.mkdir(exist_ok=True)
    usual = {
        "--pretrained_model_name_or_path": "base", "--train_data_dir": str(data), "--output_dir": str(tmp_path / "out")
    }  # fmt: skip
    return [w for flag in usual.items() if flag[0] not in more for w in flag] + list(more)


def test_every_option_is_documented(tmp_path):
    assert (ROOT / "docs/OPTIONS.md").read_text() == option_table()  # python -m sdxl_ambient.option_table docs/OPTIONS.md
    assert main([str(tmp_path / "written.md")]) == 0 and (tmp_path / "written.md").read_text() == option_table()
    fields = {f.name: f for cls in (LatentsOptions, TrainOptions) for f in dataclasses.fields(cls)}
    assert {f.name for _, own in groups(TrainOptions) for f in own} == fields.keys()
    for name, field in fields.items():
        assert len(field.metadata["help"]) > 5, name


# What numbers are in, or counts of what.
UNITS = re.compile(
    r"pixels|timesteps?|minutes|(optimizer|sampler|reverse) steps|steps in a row|samples|images|latents|captions|evaluations"
    r"|forward passes|passes over|validations|checkpoints|processes|cycles|equal ranges|\bpart of\b"
)
# Numbers without a unit: rates, factors, weights of losses, exponents.
PLAIN = {
    "rank", "lora_alpha", "lora_dropout", "text_encoder_lr", "snr_gamma", "balance_cap", "consistency_weight",
    "restore_weight", "clean_weight", "ema_decay", "seed", "learning_rate", "lr_power", "adam_beta1", "adam_beta2",
    "adam_weight_decay", "adam_epsilon", "max_grad_norm", "restore_refresh",
}  # fmt: skip


@pytest.mark.parametrize("cls", [LatentsOptions, TrainOptions])
def test_help_says_what_every_flag_is_and_what_numbers_are_in(cls, capsys):
    with pytest.raises(SystemExit):
        load_options(cls, ["--help"], prog="script")
    shown, hints = " ".join(capsys.readouterr().out.split()), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        text = field.metadata["help"]
        assert f"--{field.name} " in shown and " ".join(text.split())[:12] in shown, field.name
        if hints[field.name] in (int, float, int | None, float | None):
            assert UNITS.search(text) or field.name in PLAIN, field.name


@pytest.mark.parametrize("cls", [LatentsOptions, TrainOptions])
def test_defaults_pass_their_own_checks(cls, tmp_path):
    options = load_options(cls, base(tmp_path))
    explicit = []
    for field in dataclasses.fields(cls):
        value = getattr(options, field.name)
        if value not in (None, []):
            explicit += [f"--{field.name}", *map(str, value if isinstance(value, list) else [value])]
    assert load_options(cls, explicit) == options


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--t_n", "999"], "--t_n: 999 is above the largest allowed value, 998"),
        (["--t_n", "-1"], "--t_n: -1 is below the smallest allowed value, 0"),
        (["--low_noise", "guess"], "--low_noise: 'guess' is not one of skip"),
        (["--finetune", "some"], "--finetune: 'some' is not one of lora, full"),
        (["--loss_space", "x"], "--loss_space: 'x' is not one of epsilon, x_n"),
        (["--rank", "0"], "--rank: 0 is below the smallest allowed value, 1"),
        (["--learning_rate", "0"], "--learning_rate: 0.0 is not above 0"),
        (["--train_batch", "3"], "unknown option 'train_batch'; did you mean 'train_batch_size'"),
        (["--train_data_dir", "/nowhere"], "--train_data_dir: '/nowhere' is not a folder"),
        (["--heldout_data_dir", "/nowhere"], "--heldout_data_dir: '/nowhere' is not a folder"),
        (["--output_dir", "/proc/nowhere/x"], "--output_dir: '/proc/nowhere/x' can not be written to"),
        (["--pretrained_model_name_or_path", "none"], "--pretrained_model_name_or_path: a value is required"),
        (["--output_dir", "none"], "--output_dir: a value is required"),
        (["--train_data_dir", "none"], "--train_data_dir: a folder of images is required"),
    ],
)
def test_wrong_training_options_are_named_in_one_line(tmp_path, argv, message):
    if "/proc" in message:
        (tmp_path / "file").write_text("")
        argv = ["--output_dir", str(tmp_path / "file")]
        message = f"--output_dir: '{tmp_path / 'file'}' is a file, a folder is needed"
    with pytest.raises(OptionError) as error:
        load_options(TrainOptions, base(tmp_path, *argv))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--t_n", "none"], "--low_noise: 'clean' has nothing to do at --t_n none; allowed is skip"),
        (["--pre_noised"], "--pre_noised: true excludes --low_noise clean, which needs the images themselves"),
        (["--aspect_ratio_buckets", "auto"], "--aspect_ratio_buckets: excludes --low_noise clean; allowed is skip"),
        (["--consistency_weight", "1"], "--consistency_weight: 1.0 needs --low_noise consistency or restore, not clean"),
        (["--clean_weight", "0"], "--clean_weight: 0.0 is not above 0"),
        (["--clean_batch_size", "0"], "--clean_batch_size: 0 is below the smallest allowed value, 1"),
        (["--clean_latents_dir", "OUT/latents"], "OUT/latents' lies inside 'OUT/latents', a store of noisy latents"),
        (["--heldout_latents_dir", "OUT/h", "--clean_latents_dir", "OUT/h/c"], "OUT/h/c' lies inside 'OUT/h', a store of"),
        (["--clean_latents_dir", "OUT/c", "--noise_key_file", "OUT/c/key"], "--noise_key_file: 'OUT/c/key' lies inside"),
    ],
)
def test_wrong_options_of_clean_levels_are_named_in_one_line(tmp_path, argv, message):
    argv, message = [a.replace("OUT", str(tmp_path)) for a in argv], message.replace("OUT", str(tmp_path))
    places = [] if "--latents_dir" in argv else ["--latents_dir", str(tmp_path / "latents")]
    with pytest.raises(OptionError) as error:
        load_options(TrainOptions, base(tmp_path, "--low_noise", "clean", *places, *argv))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_clean_levels_need_the_images_or_a_finished_store(tmp_path):
    for name in ("latents", "clean"):
        (tmp_path / name).mkdir()
    (tmp_path / "latents/manifest.json").write_text("{}")
    argv = base(tmp_path, "--train_data_dir", "none", "--low_noise", "clean", "--latents_dir", str(tmp_path / "latents"))
    argv += ["--clean_latents_dir", str(tmp_path / "clean")]
    with pytest.raises(
        OptionError, match="--clean_latents_dir: .* is not a finished store and there is no --train_data_dir"
    ):
        load_options(TrainOptions, argv)
    (tmp_path / "clean/manifest.json").write_text("{}")
    options = load_options(TrainOptions, [*argv, "--train_batch_size", "5", "--clean_weight", "0.3"])
    assert options.clean_per_batch == 3 and objective_settings(options).restore_weight == 0.3
    options = load_options(TrainOptions, base(tmp_path, "--clean_weight", "0.3", "--restore_weight", "0.7"))
    assert objective_settings(options).restore_weight == 0.7
    assert options.stores["clean_latents_dir"] == tmp_path / "out/latents_clean_unprotected"


def test_training_from_an_unfinished_store_alone_is_refused(tmp_path):
    argv = base(tmp_path, "--train_data_dir", "none", "--latents_dir", str(tmp_path / "store"))
    with pytest.raises(OptionError, match="--latents_dir: .* is not a finished store and there is no --train_data_dir"):
        load_options(TrainOptions, argv)


def test_features_of_other_machines_are_refused_with_a_reason(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has them")
    for argv, message in (
        (["--enable_xformers_memory_efficient_attention"], "needs a CUDA device"),
        (["--mixed_precision", "fp16"], "fp16 needs a CUDA device; on a CPU allowed are no, bf16"),
    ):
        with pytest.raises(OptionError, match=message):
            load_options(TrainOptions, base(tmp_path, *argv))


@pytest.mark.parametrize("cls", [LatentsOptions, TrainOptions])
def test_a_key_inside_the_results_or_the_data_is_refused(cls, tmp_path):
    for place in ("out/key", "out/deep/key", "images/key", "other/../out/key"):
        with pytest.raises(OptionError, match="--noise_key_file: .* lies inside"):
            load_options(cls, base(tmp_path, "--noise_key_file", str(tmp_path / place)))
    assert load_options(cls, base(tmp_path, "--noise_key_file", str(tmp_path / "keys" / "key")))
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(OptionError, match="lies inside"):
        load_options(cls, base(tmp_path, "--noise_key_file", str(tmp_path / "link" / "key")))


def test_a_key_inside_a_store_is_refused(tmp_path):
    store = tmp_path / "store"
    with pytest.raises(OptionError, match="lies inside"):
        argv = ["--latents_dir", str(store), "--noise_key_file", str(store / "k")]
        load_options(TrainOptions, base(tmp_path, *argv))
