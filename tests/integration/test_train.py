"""The training script, run as users run it: through accelerate launch, on real emoji and the shipped miniature."""

import gc
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from support.pictures import copy_emoji
from support.running import (
    ROOT,
    SCRIPT,
    arguments,
    assert_identical,
    assert_same_updates,
    error_line,
    launch,
    no_lora_yet,
    process_env,
    states,
    train_here,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdxl_ambient.objective import ambient_objective
from sdxl_ambient.pipeline import sample
from sdxl_ambient.training.state import load_tree

FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    return copy_emoji(tmp_path_factory.mktemp("data") / "emoji", 6)


@pytest.fixture(scope="module")
def uninterrupted(emoji, tmp_path_factory):
    """Six steps in one go; 6 images in batches of 4, so that checkpoints fall into the middle of epochs."""
    output = tmp_path_factory.mktemp("train") / "run"
    run = launch(arguments(emoji, output))
    return output, run.stdout + run.stderr


def test_run_says_what_it_does_and_saves(uninterrupted):
    output, log = uninterrupted
    assert "Encoding the images to noisy latents, once" in log
    assert re.search(r"steps:.*loss=", log)
    info = json.loads((output / "training.json").read_text())
    assert info["t_n"] == 500 and info["step"] == 6 and info["images"] == 6
    weights = load_file(output / "pytorch_lora_weights.safetensors")
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert all(torch.isfinite(w).all() for w in weights.values())


def test_adapter_changes_the_stock_pipeline(uninterrupted):
    output, _ = uninterrupted
    pipe = StableDiffusionXLPipeline.from_pretrained(ROOT / "miniature/pipeline", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def draw():
        return pipe(
            "grinning face", num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="latent"
        ).images

    base = draw()
    pipe.load_lora_weights(output)
    assert (draw() - base).abs().max() > 1e-3


@pytest.mark.slow  # SIGTERM and halves of runs are resumed elsewhere
def test_killed_and_resumed_equals_uninterrupted(emoji, tmp_path, uninterrupted):
    output = tmp_path / "run"
    # The same noise as the uninterrupted run.
    key = uninterrupted[0].parent / "key"
    command = [sys.executable, *SCRIPT, *arguments(emoji, output, noise_key_file=key, max_train_steps=6)]
    process = subprocess.Popen(command, env=process_env(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (output / "checkpoint-2").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Whatever had been reached, the rest is forgotten and the run goes on from the middle of the first epoch.
    for later in ("checkpoint-4", "checkpoint-6", "pytorch_lora_weights.safetensors"):
        path = output / later
        if path.is_dir():
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        path.unlink(missing_ok=True) if path.is_file() else None
    run = launch(arguments(emoji, output, noise_key_file=key, resume_from_checkpoint="latest"))
    assert "Resuming from" in run.stdout and "checkpoint-2" in run.stdout
    assert_identical(states(output / "checkpoint-6"), states(uninterrupted[0] / "checkpoint-6"))
    assert_identical(
        load_file(output / "pytorch_lora_weights.safetensors"),
        load_file(uninterrupted[0] / "pytorch_lora_weights.safetensors"),
    )


@pytest.mark.slow  # what two processes see, and exact resumes of one, are tested beside it
def test_two_processes_train_and_resume_exactly(emoji, tmp_path, capsys):
    common = dict(train_batch_size=2, max_train_steps=4, latents_dir=tmp_path / "latents", noise_key_file=tmp_path / "key")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    launch(arguments(emoji, whole, **common), processes=2)
    shutil.copytree(whole / "checkpoint-2", parts / "checkpoint-2")
    launch(arguments(emoji, parts, **common, resume_from_checkpoint="latest"), processes=2)
    assert_identical(states(whole / "checkpoint-4"), states(parts / "checkpoint-4"))
    # One process goes on from it with the same samples, and says what that changes.
    alone = tmp_path / "alone"
    shutil.copytree(whole / "checkpoint-2", alone / "checkpoint-2")
    changed = {**common, "train_batch_size": 4, "resume_from_checkpoint": "latest"}
    assert train_here(arguments(emoji, alone, **changed)) == 0
    said = capsys.readouterr().out
    assert "was written by 2 processes and goes on with 1" in said and "--lora_dropout draws anew" in said
    assert json.loads((alone / "training.json").read_text())["step"] == 4


@pytest.mark.parametrize("finetune", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_two_processes_see_what_one_sees(emoji, tmp_path, finetune):
    """The same global batch: the same samples, times and noise, so the same weights but for the order of the sums."""
    common = dict(
        max_train_steps=2,
        latents_dir=tmp_path / "latents",
        noise_key_file=tmp_path / "key",
        lora_dropout=0,
        # With ε = 1 an update is proportional to the gradient; else Adam blows rounding errors up to full steps.
        adam_epsilon=1.0,
        learning_rate={"lora": 1.0, "full": 1e-2}[finetune],
        finetune=finetune,
    )
    single, double = tmp_path / "single", tmp_path / "double"
    assert train_here(arguments(emoji, single, **common, train_batch_size=4)) == 0
    run = launch(arguments(emoji, double, **common, train_batch_size=2), processes=2)
    assert run.stdout.count("4 samples each") == 1  # two processes of two samples, one of which speaks
    file = {"lora": "pytorch_lora_weights.safetensors", "full": "unet/diffusion_pytorch_model.safetensors"}[finetune]
    one, two = (load_file(d / file) for d in (single, double))
    if finetune == "lora":
        assert_same_updates(one, two, no_lora_yet(one), least=1e-4)
        return
    start = UNet2DConditionModel.from_pretrained(ROOT / "miniature/pipeline", subfolder="unet").state_dict()
    assert_same_updates(one, two, start, least=1e-5)


def test_full_finetune_gives_a_loadable_unet(emoji, tmp_path):
    output = tmp_path / "run"
    assert train_here(arguments(emoji, output, finetune="full", max_train_steps=2, gradient_accumulation_steps=2)) == 0
    tuned = UNet2DConditionModel.from_pretrained(output / "unet")
    base = UNet2DConditionModel.from_pretrained(ROOT / "miniature/pipeline", subfolder="unet", torch_dtype=torch.float32)
    moved = [not torch.equal(a, b) for a, b in zip(tuned.parameters(), base.parameters(), strict=True)]
    assert all(p.dtype == torch.float32 for p in tuned.parameters()) and sum(moved) > 0.9 * len(moved)


def test_heldout_loss_keeps_the_best_and_validation_draws_images(emoji, tmp_path):
    output, prompts = tmp_path / "run", tmp_path / "prompts.txt"
    prompts.write_text("# one in a line\na cat\n")
    changes = dict(
        heldout_data_dir=ROOT / "miniature/data/heldout",
        heldout_samples=8,
        validation_steps=2,
        max_train_steps=4,
        validation_prompt="grinning face",
        validation_prompts_file=prompts,
        num_validation_images=1,
        validation_inference_steps=3,
        mixed_precision="bf16",
        gradient_checkpointing="true",
        report_to="tensorboard",
    )
    assert train_here([*arguments(emoji, output, **changes), "--validation_sampler", "auto", "early_stop"]) == 0
    record = json.loads((output / "heldout_loss.json").read_text())
    assert [r["step"] for r in record["losses"]] == [2, 4]
    assert record["best"][1] == min(r["heldout"] for r in record["losses"])
    assert [b["band"] for b in record["losses"][0]["bands"]] == ["501-624", "625-749", "750-874", "875-999"]
    assert (output / "best/pytorch_lora_weights.safetensors").is_file()
    for sampler in ("hybrid", "early_stop"):
        assert (output / f"validation/step-000004/{sampler}/01-00.png").is_file()
    assert list((output / "logs").rglob("events.out.tfevents.*"))


def alive():
    """The models that are in memory beside UNets, and how many UNets there are."""
    found = [o for o in gc.get_objects() if isinstance(o, (AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection))]
    return {id(o) for o in found}, sum(isinstance(o, UNet2DConditionModel) for o in gc.get_objects())


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_only_the_unet_is_in_memory_while_training(emoji, tmp_path, monkeypatch, finetune):
    """Neither VAE nor text encoders, before a validation or after it; and of a full fine-tune no second UNet."""
    gc.collect()
    (others, unets), objective, seen, inside = alive(), ambient_objective, [], []

    def watched(*arguments):
        models, count = alive()
        seen.append((len(models - others), count - unets))
        return objective(*arguments)

    def drawing(pipe, *arguments, base_unet=None, **keywords):
        parts = {name: getattr(pipe, name).dtype for name in ("unet", "vae", "text_encoder", "text_encoder_2")}
        inside.append({**parts, "base": None if base_unet is None else base_unet.dtype})
        return sample(pipe, *arguments, base_unet=base_unet, **keywords)

    monkeypatch.setattr("sdxl_ambient.training.step.ambient_objective", watched)
    monkeypatch.setattr("sdxl_ambient.training.samples.sample", drawing)
    changes = dict(
        finetune=finetune, max_train_steps=2, validation_steps=1, validation_prompt="cat", num_validation_images=1,
        validation_inference_steps=2, mixed_precision="bf16",
    )  # fmt: skip
    assert train_here(arguments(emoji, tmp_path / "run", **changes)) == 0
    assert seen == [(0, 1)] * 2
    half = dict.fromkeys(("vae", "text_encoder", "text_encoder_2"), torch.bfloat16)
    unet = {"lora": (torch.bfloat16, None), "full": (torch.float32, torch.bfloat16)}[finetune]
    assert inside == [{**half, **dict(zip(("unet", "base"), unet, strict=True))}] * 2


def test_accumulated_batches_give_what_one_batch_gives(emoji, tmp_path):
    """The same weights, and the same learning rates at the same steps."""
    common = dict(max_train_steps=3, latents_dir=tmp_path / "latents", lora_dropout=0, adam_epsilon=1.0, learning_rate=1.0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_here(arguments(emoji, whole, **common, train_batch_size=4)) == 0
    assert train_here(arguments(emoji, parts, **common, train_batch_size=2, gradient_accumulation_steps=2)) == 0
    one, two = (load_file(d / FILE) for d in (whole, parts))
    assert_same_updates(one, two, no_lora_yet(one))
    schedules = [load_tree(d / "checkpoint-2/registered_0.safetensors") for d in (whole, parts)]
    assert schedules[0] == schedules[1]


def test_key_is_in_no_artefact(uninterrupted):
    output, log = uninterrupted
    key = (output.parent / "key").read_text().strip()
    for path in output.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert key.encode() not in data and bytes.fromhex(key) not in data, path
    assert key not in log


def test_another_run_is_not_overwritten_or_resumed(emoji, uninterrupted, capsys):
    output, _ = uninterrupted
    key = output.parent / "key"
    run = launch(arguments(emoji, output, noise_key_file=key), check=False)
    assert "holds an earlier run" in error_line(run)
    for change, message in [
        ({"seed": 1}, "another run: seed: stored 0, wanted 1"),
        ({"t_n": 300}, "latent.t_n: stored 500, wanted 300"),
    ]:
        assert train_here(arguments(emoji, output, noise_key_file=key, resume_from_checkpoint="latest", **change)) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t_n": 999}, "--t_n: 999 is above the largest allowed value, 998"),
        ({"rnak": 3}, "unknown option 'rnak'; did you mean 'rank'?"),
        ({"finetune": "loha"}, "--finetune: 'loha' is not one of lora, full"),
        ({"enable_xformers_memory_efficient_attention": "true"}, "needs a CUDA device"),
        ({"mixed_precision": "fp16"}, "--mixed_precision: fp16 needs a CUDA device"),
        ({"train_data_dir": "/nowhere"}, "--train_data_dir: '/nowhere' is not a folder"),
    ],
)
def test_wrong_options_are_one_line_before_anything_is_loaded(emoji, tmp_path, capsys, changes, message):
    if torch.cuda.is_available() and "CUDA" in message:
        pytest.skip("there is a CUDA device")
    import train_sdxl_ambient

    with pytest.raises(SystemExit) as stopped:
        train_sdxl_ambient.main(arguments(emoji, tmp_path / "run", **changes))
    assert stopped.value.code == 2
    printed = capsys.readouterr().err.strip()
    assert message in printed and "\n" not in printed
    assert not (tmp_path / "run").exists()
