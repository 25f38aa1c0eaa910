"""The training script with each kind of weights and optimizer: stopped halfway and resumed, it ends where it would have."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from support.pictures import copy_emoji
from support.running import ROOT, arguments, assert_identical, train_here

STEPS = 4
FULL = {"finetune": "full", "rank": None, "lora_alpha": None, "lora_dropout": None}
VARIANTS = {
    "text_encoder": {
        "train_text_encoder": "true",
        "text_encoder_lr": 1e-2,
        "lora_dropout": 0,
        "proportion_empty_prompts": 0.3,
    },
    "pissa": {"init_lora_weights": "pissa", "use_rslora": "true"},
    "averaged": {"use_ema": "true", "offload_ema": "true", "random_flip": "true", "ema_decay": 0.5},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1, "lr_scheduler": "constant"},
    "schedule_free": {"optimizer": "adamw_schedulefree", "lr_scheduler": "constant", "lr_warmup_steps": 2},
    "fused": {**FULL, "fused_backward_pass": "true", "optimizer": "adafactor", "max_grad_norm": 0},
    "eight_bits": {"use_8bit_adam": "true"},
    "quantised": {"quantize_base": "nf4"},
}
# Their parts are tested in test_optimizers.py, test_quantization.py and test_lora.py.
SLOW = ("prodigy", "eight_bits", "quantised", "pissa", "fused")
NEEDS = {"prodigy": "prodigyopt", "schedule_free": "schedulefree", "eight_bits": "bitsandbytes", "quantised": "bitsandbytes"}


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    return copy_emoji(tmp_path_factory.mktemp("data") / "emoji", 6)


@pytest.fixture(scope="module")
def stores(emoji, tmp_path_factory):
    """One store for all, with the captions' tokens."""
    folder = tmp_path_factory.mktemp("stores")
    common = {"latents_dir": folder / "latents", "noise_key_file": folder / "key", "train_batch_size": 2}
    run = arguments(emoji, folder / "run", **common, train_text_encoder="true", dry_run="true")
    assert train_here(run) == 0
    return {**common, "max_train_steps": STEPS}


def weights(folder):
    file = folder / "pytorch_lora_weights.safetensors"
    return load_file(file if file.is_file() else folder / "unet/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("name", [pytest.param(v, marks=pytest.mark.slow) if v in SLOW else v for v in VARIANTS])
def test_stopped_and_resumed_equals_uninterrupted(emoji, stores, tmp_path, name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = {**stores, **VARIANTS[name]}
    assert train_here(arguments(emoji, whole, **changes)) == 0
    shutil.copytree(whole / "checkpoint-2", parts / "checkpoint-2")
    # Another number of worker processes changes nothing.
    more = {"resume_from_checkpoint": "latest", "dataloader_num_workers": 1 if name == "averaged" else 0}
    assert train_here(arguments(emoji, parts, **changes, **more)) == 0
    assert_identical(weights(whole), weights(parts))
    loads_in_a_stock_pipeline(whole)


def loads_in_a_stock_pipeline(folder):
    base = ROOT / "miniature/pipeline"
    if (folder / "unet").is_dir():
        UNet2DConditionModel.from_pretrained(folder / "unet")
        return
    pipe = StableDiffusionXLPipeline.from_pretrained(base, torch_dtype=torch.float32)
    pipe.load_lora_weights(folder)
    loaded = [
        p for m in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2) for n, p in m.named_parameters() if "lora_B" in n
    ]
    assert loaded and all(p.abs().max() > 0 for p in loaded)


def test_pictures_of_several_shapes_train_in_batches_of_one(photographs, tmp_path, capsys):
    """Buckets, mirrored latents and dropped captions, through the script; a resume in the middle ends the same."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = {
        "aspect_ratio_buckets": "auto", "bucket_reso_steps": 16, "random_flip": "true", "proportion_empty_prompts": 0.5,
        "train_batch_size": 2, "max_train_steps": STEPS, "latents_dir": tmp_path / "latents",
    }  # fmt: skip
    assert train_here(arguments(photographs, whole, **changes)) == 0
    manifest = json.loads((tmp_path / "latents/manifest.json").read_text())
    sizes = {tuple(i["time_ids"][4:]) for i in manifest["images"]}
    assert len(sizes) == 2 and all(h * w <= 64 * 64 and h % 16 == w % 16 == 0 for h, w in sizes)
    assert "are fewer than the 2 of a batch" in capsys.readouterr().out  # one photograph stands upright
    shutil.copytree(whole / "checkpoint-2", parts / "checkpoint-2")
    assert train_here(arguments(photographs, parts, **changes, resume_from_checkpoint="latest")) == 0
    assert_identical(weights(whole), weights(parts))


def test_another_strength_is_another_run(emoji, stores, tmp_path, capsys):
    run = tmp_path / "run"
    assert train_here(arguments(emoji, run, **{**stores, "max_train_steps": 2})) == 0
    for name, value, message in [
        ("lora_alpha", 8, "lora_alpha: stored 2.0, wanted 8.0"),
        ("optimizer", "adafactor", "optimizer: stored 'adamw', wanted 'adafactor'"),
        ("train_batch_size", 4, "samples_per_step: stored 2, wanted 4"),
    ]:
        changed = {**stores, name: value, "resume_from_checkpoint": "latest"}
        assert train_here(arguments(emoji, run, **changed)) == 2
        assert message in capsys.readouterr().err


def test_training_goes_on_from_a_lora(emoji, stores, tmp_path):
    """Ours, as any other program's: rank, alpha and targets are the file's, and a first step starts from its weights."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert train_here(arguments(emoji, first, **{**stores, "max_train_steps": 2})) == 0
    decided = {"rank": None, "lora_alpha": None, "lora": first, "learning_rate": 1e-12}
    assert train_here(arguments(emoji, second, **{**stores, **decided, "max_train_steps": 1})) == 0
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=0)


def test_a_rising_loss_stops_and_the_best_is_kept(emoji, stores, tmp_path, capsys):
    output = tmp_path / "run"
    changes = {
        "heldout_data_dir": emoji, "heldout_latents_dir": stores["latents_dir"], "validation_steps": 1, "early_stopping": 2,
        "learning_rate": 10, "lr_scheduler": "constant", "max_train_steps": 20, "allow_second_observation": "true",
    }  # fmt: skip
    assert train_here(arguments(emoji, output, **{**stores, **changes})) == 0
    printed = capsys.readouterr().out
    assert "the held-out loss has not fallen for 2 validations" in printed
    record = json.loads((output / "heldout_loss.json").read_text())
    stopped = record["losses"][-1]["step"]
    assert stopped == record["best"][0] + 2 < 20 and (output / f"checkpoint-{stopped}").is_dir()
    assert json.loads((output / "best/training.json").read_text())["step"] == record["best"][0]


def test_averages_are_what_is_validated_and_saved(emoji, stores, tmp_path):
    output = tmp_path / "run"
    changes = {
        "heldout_data_dir": emoji, "heldout_latents_dir": stores["latents_dir"], "validation_steps": STEPS,
        "use_ema": "true", "allow_second_observation": "true",
    }  # fmt: skip
    assert train_here(arguments(emoji, output, **{**stores, **changes})) == 0
    assert_identical(weights(output), weights(output / "best"))
    trained = weights(output / f"checkpoint-{STEPS}")
    assert any(not torch.equal(trained[name], w) for name, w in weights(output).items())


def test_a_dry_run_says_all_and_trains_nothing(emoji, stores, tmp_path, capsys):
    output = tmp_path / "run"
    assert train_here(arguments(emoji, output, **stores, dry_run="true")) == 0
    found = json.loads((output / "dry_run.json").read_text())
    assert found["counts"]["images"] == 6 and found["steps"] == STEPS and len(found["first_batch"]) == 2
    assert found["sizes"] == [{"height": 64, "width": 64, "images": 6}] and found["t_n"] == {"500": 6}
    assert found["memory"]["activations"] > 0
    assert "Nothing was trained" in capsys.readouterr().out
    assert (output / "dry_run.png").is_file() and not list(output.glob("checkpoint-*"))


def test_a_dry_run_counts_the_rows_of_restored_samples(emoji, stores, tmp_path):
    """With levels low they stand beside the noisy rows: half as many again here, and the activations grow with them."""
    found = {}
    for low_noise in ("skip", "restore"):
        output = tmp_path / low_noise
        assert train_here(arguments(emoji, output, **stores, dry_run="true", low_noise=low_noise)) == 0
        found[low_noise] = json.loads((output / "dry_run.json").read_text())["memory"]["activations"]
    assert found["restore"] == pytest.approx(1.5 * found["skip"], rel=0.1)
