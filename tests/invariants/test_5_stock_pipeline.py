"""Invariant 5: a saved adapter in the stock pipeline gives the output of the UNet that was trained."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from support.tuned import output, unet_inputs, with_lora

from sdxl_ambient.formats.peft import save_lora

INFO = {"t_n": 500, "low_noise": "skip"}


@pytest.fixture(scope="module")
def inputs(unet):
    return unet_inputs(unet)


@pytest.mark.parametrize(
    ("targets", "rank", "alpha", "use_dora"),
    [
        (["attention"], 4, 4, False),
        (["attention"], 4, 16, False),
        (["all"], 8, 2, False),
        (["attention"], 4, 8, True),
        (["to_k", "conv_in"], 3, 7, False),
    ],
)
def test_a_saved_lora_in_the_stock_pipeline_gives_the_training_output(
    unet, miniature, tmp_path, inputs, targets, rank, alpha, use_dora
):
    tuned = with_lora(unet, targets=targets, rank=rank, alpha=alpha, use_dora=use_dora)
    path = save_lora(tuned, tmp_path, INFO)
    assert path.name == "pytorch_lora_weights.safetensors"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pytorch_lora_weights.safetensors", "training.json"]
    pipe = StableDiffusionXLPipeline.from_pretrained(miniature, add_watermarker=False)
    before = output(pipe.unet, inputs)
    torch.testing.assert_close(before, output(unet, inputs), rtol=0, atol=1e-6)
    pipe.load_lora_weights(tmp_path)
    want = output(tuned, inputs)
    torch.testing.assert_close(output(pipe.unet, inputs), want, rtol=1e-5, atol=1e-5)
    assert (want - before).abs().max() > 1e-2
