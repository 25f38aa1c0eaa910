"""Weights spread over processes: FSDP in two CPU processes gives what one process gives; DeepSpeed where it is installed."""

import importlib.util
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from support.pictures import copy_emoji
from support.running import ROOT, arguments, assert_identical, assert_same_updates, no_lora_yet, process_env, train_here

from sdxl_ambient.config.settings import settings_of
from sdxl_ambient.config.training import TrainOptions
from sdxl_ambient.errors import OptionError
from sdxl_ambient.training.distributed import ShardingSettings, as_number, check_sharding

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock,ResnetBlock2D",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
# With ε = 1 an update is proportional to the gradient; else Adam blows rounding errors up to full steps.
EXACT = {"adam_epsilon": 1.0, "lora_dropout": 0, "max_train_steps": 2, "checkpointing_steps": 1}


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    return copy_emoji(tmp_path_factory.mktemp("data") / "emoji", 6)


def sharded(arguments, processes=2, **environment):
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, "-m", *launcher, str(ROOT / "tests/support/fsdp_on_cpu.py"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=process_env(**environment), cwd=ROOT, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_fsdp_trains_and_saves_as_one_process_and_resumes(emoji, tmp_path, finetune):
    rate = {"full": 1e-2, "lora": 1.0}[finetune]
    common = {"latents_dir": tmp_path / "latents", "noise_key_file": tmp_path / "key", **EXACT}
    common |= {"finetune": finetune, "learning_rate": rate, "heldout_data_dir": emoji, "allow_second_observation": "true"}
    common |= {"heldout_latents_dir": tmp_path / "latents", "validation_prompt": "cat", "num_validation_images": 1}
    common |= {"validation_inference_steps": 2, "validation_steps": 2}
    single, double, parts = (tmp_path / name for name in ("single", "double", "parts"))
    assert train_here(arguments(emoji, single, **common, train_batch_size=4)) == 0
    sharded(arguments(emoji, double, **common, train_batch_size=2), **FSDP)
    one, two = weights(single), weights(double)
    assert one.keys() == two.keys()
    base = UNet2DConditionModel.from_pretrained(ROOT / "miniature/pipeline", subfolder="unet").state_dict()
    assert_same_updates(one, two, no_lora_yet(one) if finetune == "lora" else base)
    assert (double / "validation/step-000002/hybrid/00-00.png").is_file() and (double / "best").is_dir()
    shutil.copytree(double / "checkpoint-1", parts / "checkpoint-1")
    said = sharded(arguments(emoji, parts, **common, train_batch_size=2, resume_from_checkpoint="latest"), **FSDP)
    assert "Resuming from" in said
    assert_identical(weights(parts), two)


def weights(folder):
    """What was saved, which loads; and is not what training started from."""
    base = ROOT / "miniature/pipeline"
    if (folder / "unet").is_dir():
        found = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
        start = UNet2DConditionModel.from_pretrained(base, subfolder="unet").state_dict()
        assert any(not torch.equal(found[name], start[name]) for name in found)
        return found
    StableDiffusionXLPipeline.from_pretrained(base).load_lora_weights(folder)
    found = load_file(folder / "pytorch_lora_weights.safetensors")
    assert max(float(w.abs().max()) for name, w in found.items() if "lora_B" in name) > 1e-4
    return found


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("finetune", ["full", "lora"])
def test_deepspeed_trains_and_saves(emoji, tmp_path, stage, finetune):
    """One process: on a CPU accelerate doesn't tell DeepSpeed's processes of each other."""
    environment = {
        "ACCELERATE_USE_CPU": "false",
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    }
    output = tmp_path / "run"
    changes = {"finetune": finetune, "learning_rate": 1e-2, "max_train_steps": 2, "checkpointing_steps": 1}
    sharded(arguments(emoji, output, **changes), processes=1, **environment)
    assert weights(output)
    changes |= {"max_train_steps": 3, "lr_scheduler": "constant", "resume_from_checkpoint": "latest"}
    said = sharded(arguments(emoji, output, **changes), processes=1, **environment)
    assert "Resuming from" in said and (output / "checkpoint-3").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_ema": True}, "--use_ema: true can't be had with FSDP"),
        ({"train_text_encoder": True}, "--train_text_encoder: true"),
        ({"low_noise": "restore"}, "--low_noise: 'restore'"),
        ({"optimizer": "adamw_schedulefree"}, "--optimizer: 'adamw_schedulefree'"),
        ({}, "fsdp_version: 1 is not supported"),
    ],
)
def test_what_sharded_weights_can_not_do_is_refused(changes, message):
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, state=state)
    settings = settings_of(ShardingSettings, TrainOptions(**changes))
    with pytest.raises(OptionError, match=message):
        check_sharding(settings, accelerator)
    check_sharding(settings, SimpleNamespace(distributed_type=DistributedType.MULTI_GPU))


def test_a_norm_is_a_number():
    assert as_number(torch.tensor(2.0)) == 2.0 and as_number(None) is None
