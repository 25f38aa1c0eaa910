"""What users of other trainers look for in a run's output."""

import json

from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from support.running import ROOT, arguments, train_here

from sdxl_ambient.pipeline import load_pipeline


def test_a_full_runs_output_says_what_its_unet_predicts(emoji, tmp_path):
    out = tmp_path / "out"
    common = dict(
        finetune="full", rank=None, lora_alpha=None, lora_dropout=None, max_train_steps=2, checkpoints_total_limit=1
    )
    assert train_here(arguments(emoji, out, **common, checkpointing_steps=1)) == 0
    base = json.loads((ROOT / "miniature/pipeline/scheduler/scheduler_config.json").read_text())
    assert json.loads((out / "scheduler/scheduler_config.json").read_text()) == base
    scheduler = EulerDiscreteScheduler.from_pretrained(out, subfolder="scheduler")
    assert scheduler.config.prediction_type == base["prediction_type"]
    assert UNet2DConditionModel.from_pretrained(out, subfolder="unet").config.in_channels == 4
    load_pipeline(str(ROOT / "miniature/pipeline"), unet=out)
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-2"]  # the last one counts towards the limit


def test_no_validation_image_is_drawn_where_none_is_wanted(emoji, tmp_path):
    out = tmp_path / "out"
    wanted = dict(validation_prompt="a cat", num_validation_images=0, validation_steps=1, max_train_steps=1)
    assert train_here(arguments(emoji, out, **wanted)) == 0
    assert not list(out.rglob("*.png"))
