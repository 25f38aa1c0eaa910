"""Whole models in the original release's layout."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file

from sdxl_ambient.errors import InterchangeError
from sdxl_ambient.formats.names import SDXL_UNET, unet_shapes
from sdxl_ambient.formats.original import original_text_encoder, original_text_encoder_2, original_unet, original_vae


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def StableDiffusionXLVae():
    from diffusers import AutoencoderKL

    widths = (128, 256, 512, 512)
    down, up = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    return AutoencoderKL(
        down_block_types=down, up_block_types=up, block_out_channels=widths, layers_per_block=2, latent_channels=4
    )


def test_the_original_layout_of_the_real_sdxl_is_what_diffusers_converts_back():
    """Names and shapes of the UNet and the VAE, full size."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_UNET)
        vae = StableDiffusionXLVae()
    state = original_unet(unet.state_dict(), unet.config)
    assert len(state) == 1680
    back = single_file_utils.convert_ldm_unet_checkpoint(state, unet.config)
    assert shapes(back) == shapes(unet.state_dict()) == unet_shapes()
    state = original_vae(vae.state_dict(), 4)
    assert len(state) == 248 and state["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    # The way up is numbered from its end.
    assert "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight" in state
    assert "first_stage_model.encoder.down.2.downsample.conv.bias" in state
    back = single_file_utils.convert_ldm_vae_checkpoint(state, vae.config)
    assert shapes(back) == shapes(vae.state_dict())


def test_the_second_text_encoder_has_open_clips_names(miniature):
    state = load_file(miniature / "text_encoder_2/model.safetensors")
    new = original_text_encoder_2(state)
    start = "conditioner.embedders.1.model."
    inside = ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
    block = {f"{start}transformer.resblocks.1.{n}.{k}" for n in inside for k in ("weight", "bias")}
    block |= {f"{start}transformer.resblocks.1.attn.in_proj_{k}" for k in ("weight", "bias")}
    assert {k for k in new if ".resblocks.1." in k} == block
    outside = {"positional_embedding", "token_embedding.weight", "ln_final.weight", "ln_final.bias", "text_projection"}
    assert {k.removeprefix(start) for k in new if "resblocks" not in k} == outside
    assert torch.equal(new[f"{start}text_projection"], state["text_projection.weight"].T)
    attention = [state[f"text_model.encoder.layers.0.self_attn.{i}_proj.weight"] for i in "qkv"]
    assert torch.equal(new[f"{start}transformer.resblocks.0.attn.in_proj_weight"], torch.cat(attention))
    with pytest.raises(InterchangeError, match="no weight of SDXL's second text encoder"):
        original_text_encoder_2({"visual_projection.weight": torch.ones(1)})


def test_text_encoders_names_with_and_without_their_wrapper_are_one():
    a, b = (original_text_encoder({f"{p}final_layer_norm.bias": torch.ones(1)}) for p in ("", "text_model."))
    assert a.keys() == b.keys() == {"conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"}
