"""Kohya's format there and back, bit for bit, and what it draws."""

import copy
import json

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from support.lora_files import (
    INFO,
    KINDS,
    LORA,
    all_outputs,
    as_kohya,
    assert_same,
    output,
    randomize,
    strengths,
    write,
)

from sdxl_ambient.errors import InterchangeError
from sdxl_ambient.formats.attach import attach
from sdxl_ambient.formats.kohya import to_kohya
from sdxl_ambient.formats.names import unet_names
from sdxl_ambient.formats.peft import lora_state, peft_file, save_lora
from sdxl_ambient.formats.read import from_kohya, read_adapter
from sdxl_ambient.models.lora import add_lora, add_text_lora
from sdxl_ambient.pipeline import load_pipeline


@pytest.mark.parametrize("layout", ["sgm", "diffusers"])
@pytest.mark.parametrize("kind", KINDS)
def test_kohyas_format_and_back_is_the_same_lora(unet, tuned, loras, config, tmp_path, kind, layout):
    state, metadata = as_kohya(loras / kind, layout, config=config)
    file = write(tmp_path / "style.safetensors", state, metadata)
    back = from_kohya(file, config)
    original = load_file(loras / kind / LORA)
    assert_same(back.peft_state(), original)
    assert_same(to_kohya(back, layout, config=config)[0], load_file(file))
    assert back.info == INFO
    again = copy.deepcopy(unet)
    attach(again, back)
    assert_same(lora_state(again), lora_state(tuned[kind]))
    want, got = strengths(tuned[kind]), strengths(again)
    assert want.keys() == got.keys()
    for name in want:
        # α√rank / rank is α/√rank but for the last bit.
        assert got[name] == (want[name] if kind != "rslora" else pytest.approx(want[name], rel=1e-15)), name
    torch.testing.assert_close(output(again), output(tuned[kind]), rtol=0, atol=0 if kind != "rslora" else 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_each_modules_alpha_is_in_the_file(tuned, loras, config, kind):
    state, _ = as_kohya(loras / kind, config=config)
    names = unet_names("sgm", config)
    for module, (rank, factor) in strengths(tuned[kind]).items():
        assert len(state[f"{names[module]}.lora_down.weight"]) == rank
        assert float(state[f"{names[module]}.alpha"]) / rank == pytest.approx(factor, rel=1e-15)
        assert state[f"{names[module]}.alpha"].shape == ()
    assert len({float(v) for k, v in state.items() if k.endswith(".alpha")}) == (4 if "alpha_pattern" in KINDS[kind] else 1)


@pytest.mark.parametrize("kind", ["plain", "patterns", "rslora"])
def test_an_exported_lora_draws_as_the_trained_one_does(miniature, unet, tuned, loras, config, tmp_path, kind):
    want = output(tuned[kind])
    file = write(tmp_path / "style.safetensors", *as_kohya(loras / kind, config=config))
    for lora in (file, loras / kind):
        got = output(load_pipeline(str(miniature), lora=lora).unet)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
    assert (want - output(unet)).abs().max() > 1e-2
    # Without our own reader; of alphas that differ, diffusers 0.42 loses those of attention in kohya's format.
    pipe = StableDiffusionXLPipeline.from_pretrained(miniature, add_watermarker=False)
    pipe.load_lora_weights(loras / kind if kind == "patterns" else file)
    torch.testing.assert_close(output(pipe.unet), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def test_a_dora_from_kohyas_format_draws_as_the_trained_one_does(miniature, tuned, loras, config, tmp_path):
    """diffusers leaves out kohya's magnitudes; ours as peft has them."""
    file = write(tmp_path / "style.safetensors", *as_kohya(loras / "dora", config=config))
    (tmp_path / "peft").mkdir()
    write(tmp_path / "peft" / LORA, *peft_file(from_kohya(file, config)))
    got, want = output(load_pipeline(str(miniature), lora=tmp_path / "peft").unet), output(tuned["dora"])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("kind", ["patterns", "dora"])
def test_the_formats_definition_gives_pefts_merged_weights(unet, tuned, loras, config, kind):
    """In closed form, float64: W + (alpha/rank)·up·down, with DoRA scaled to length m per output."""
    state, _ = as_kohya(loras / kind, config=config)
    merged = copy.deepcopy(tuned[kind]).double()
    names, checked = unet_names("sgm", config), 0
    for name, layer in merged.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        base = unet.get_submodule(name).weight.double()
        part = {k: state[f"{names[name]}.{k}"].double() for k in ("lora_up.weight", "lora_down.weight", "alpha")}
        down, up = part["lora_down.weight"], part["lora_up.weight"]
        weight = base + (part["alpha"] / len(down)) * (up.flatten(1) @ down.flatten(1)).reshape(base.shape)
        if kind == "dora":
            scale = state[f"{names[name]}.dora_scale"].double()
            assert scale.shape == (len(base), *(1 for _ in base.shape[1:]))
            weight = weight * (scale / weight.flatten(1).norm(dim=1).reshape(scale.shape))
        layer.merge()
        torch.testing.assert_close(weight, layer.get_base_layer().weight.data, rtol=1e-10, atol=1e-10)
        checked += 1
    assert checked == len(strengths(merged)) > 60


@pytest.mark.parametrize("layout", ["sgm", "diffusers"])
def test_text_encoders_go_along(miniature, all_parts, config, tmp_path, layout):
    pipe, folder = all_parts
    state, metadata = as_kohya(folder, layout, config=config)
    assert {k.split("_")[1] for k in state} == {"unet", "te1", "te2"}
    assert "lora_te2_text_model_encoder_layers_1_self_attn_out_proj.lora_up.weight" in state
    assert float(state["lora_te1_text_model_encoder_layers_0_self_attn_q_proj.alpha"]) == 9
    file = write(tmp_path / "style.safetensors", state, metadata)
    (tmp_path / "peft").mkdir()
    write(tmp_path / "peft" / LORA, *peft_file(from_kohya(file, config)))
    want = all_outputs(pipe)
    for lora in (file, tmp_path / "peft", folder):
        for got, wanted in zip(all_outputs(load_pipeline(str(miniature), lora=lora)), want, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    assert_same(to_kohya(from_kohya(file, config), layout, config=config)[0], state)
    with pytest.raises(
        InterchangeError, match="weights of text_encoder and text_encoder_2; they are trained on with --train_te"
    ):
        attach(copy.deepcopy(pipe.unet), from_kohya(file, config))


def test_doras_of_text_encoders_and_pissas_come_back_whole(miniature, config, tmp_path):
    """Through kohya's format into a file that the stock loader takes."""
    pipe = load_pipeline(str(miniature))
    models = [pipe.unet, pipe.text_encoder, pipe.text_encoder_2]
    add_lora(models[0], rank=4, alpha=3, targets=["attention"], use_rslora=True, init="pissa")
    add_text_lora(models[1:], rank=2, alpha=3, targets=["linear"], use_dora=True)
    for seed, model in enumerate(models):
        randomize(model, seed)
    saved = save_lora(models[0], tmp_path / "ours", INFO, models[1:])
    file = write(tmp_path / "style.safetensors", *as_kohya(saved, config=config))
    again = from_kohya(file, config)
    assert_same(again.peft_state(), load_file(saved))
    assert any(name.startswith("text_encoder.") and "magnitude" in name for name in again.peft_state())
    (tmp_path / "peft").mkdir()
    write(tmp_path / "peft" / LORA, *peft_file(again))
    want = all_outputs(pipe)
    for folder in ("ours", "peft"):
        for got, wanted in zip(all_outputs(load_pipeline(str(miniature), lora=tmp_path / folder)), want, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def test_kohyas_keys_and_modelspecs(loras, config):
    _, said = as_kohya(loras / "patterns", config=config, title="Emoji", date="2025-01-02")
    assert {k: v for k, v in said.items() if k.startswith("ss_")} == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "6.0",
        "ss_network_args": json.dumps({"conv_dim": "2", "conv_alpha": "6.0"}),
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_output_name": "Emoji",
        "ss_sd_model_name": "pipeline",
    }
    assert said["modelspec.title"] == "Emoji" and said["modelspec.date"] == "2025-01-02"
    assert said["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
    assert all(isinstance(v, str) for v in said.values())
    _, dora = as_kohya(loras / "dora", config=config)
    assert dora["ss_network_module"] == "lycoris.kohya" and json.loads(dora["ss_network_args"])["dora_wd"] == "True"


def test_a_precision_is_stored_and_alphas_stay_exact(loras, config):
    short, _ = as_kohya(loras / "patterns", config=config, dtype=torch.bfloat16)
    full, _ = as_kohya(loras / "patterns", config=config)
    for name, tensor in short.items():
        if name.endswith(".alpha"):
            assert torch.equal(tensor, full[name]) and tensor.dtype in (torch.float32, torch.float64)
        else:
            assert torch.equal(tensor, full[name].bfloat16())


def test_values_too_large_for_a_precision_are_refused(loras, config):
    adapter = read_adapter(loras / "plain", config)
    adapter.parts["unet"]["conv_in"].up[0, 0] = 1e6
    with pytest.raises(InterchangeError, match="too large for float16; take bfloat16"):
        to_kohya(adapter, config=config, dtype=torch.float16)
