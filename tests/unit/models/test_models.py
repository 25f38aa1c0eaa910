"""Loading, refusing what is not SDXL, LoRA targets, and the UNet as a function."""

import copy
import json
import shutil

import pytest
import torch

from sdxl_ambient.errors import ModelError
from sdxl_ambient.models.base import check_sdxl, load_schedule
from sdxl_ambient.models.denoiser import Conditioning, Denoiser
from sdxl_ambient.models.load import load_encoders, load_unet
from sdxl_ambient.models.lora import add_lora, lora_targets, trainable_to_float32


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def copy_pipeline(source, target):
    shutil.copytree(source, target)
    return target


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_miniature_is_sdxl_frozen_and_in_float32(miniature, encoders):
    assert check_sdxl(str(miniature))["_class_name"] == "StableDiffusionXLPipeline"
    for module in (encoders.vae, *encoders.text_encoders):
        assert not module.training and {p.dtype for p in module.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in module.parameters())
    half = load_unet(miniature, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert load_schedule(str(miniature)).num_timesteps == 1000


def test_a_unet_loads_from_its_own_folder_too(miniature, unet):
    alone = load_unet(miniature / "unet")
    assert all(torch.equal(p, q) for p, q in zip(alone.parameters(), unet.parameters(), strict=True))


def test_another_vae_can_be_given_as_pipeline_or_folder(miniature, tmp_path, encoders):
    for where in (miniature, miniature / "vae"):
        got = load_encoders(str(miniature), vae=str(where)).vae
        assert all(torch.equal(p, q) for p, q in zip(got.parameters(), encoders.vae.parameters(), strict=True))


def test_missing_models_are_one_line(tmp_path):
    for load in (check_sdxl, load_unet, load_encoders, load_schedule):
        with pytest.raises(ModelError) as error:
            load(str(tmp_path / "nowhere"))
        assert "nowhere" in one_line(error)
    (tmp_path / "empty").mkdir()
    for load in (check_sdxl, load_unet, load_encoders, load_schedule):
        with pytest.raises(ModelError) as error:
            load(str(tmp_path / "empty"))
        assert "empty" in one_line(error)


def test_other_architectures_are_named(miniature, tmp_path):
    other = copy_pipeline(miniature, tmp_path / "other")
    edit(other / "unet" / "config.json", addition_embed_type=None)
    with pytest.raises(ModelError, match="not an SDXL model"):
        check_sdxl(str(other))
    edit(other / "unet" / "config.json", addition_embed_type="text_time")
    edit(other / "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(ModelError, match="holds a StableDiffusionPipeline, not an SDXL model"):
        check_sdxl(str(other))
    edit(other / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline", text_encoder=[None, None])
    with pytest.raises(ModelError, match="refiner"):
        check_sdxl(str(other))
    (other / "model_index.json").write_text("{broken")
    with pytest.raises(ModelError) as error:
        check_sdxl(str(other))
    one_line(error)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder_2"])
def test_truncated_weights_are_one_line(miniature, tmp_path, part):
    broken = copy_pipeline(miniature, tmp_path / "broken")
    (weights,) = (broken / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError) as error:
        load_unet(broken) if part == "unet" else load_encoders(str(broken))
    assert str(broken) in one_line(error) and "can't be loaded" in one_line(error)


def test_pickled_weights_are_not_read(miniature, tmp_path):
    broken = copy_pipeline(miniature, tmp_path / "broken")
    (weights,) = (broken / "unet").glob("*.safetensors")
    weights.unlink()
    torch.save({}, broken / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError) as error:
        load_unet(broken)
    one_line(error)


# -- LoRA ---------------------------------------------------------------------------------------------------


def test_presets_and_names_become_endings():
    assert lora_targets(["attention"]) == ["to_q", "to_k", "to_v", "to_out.0"]
    assert set(lora_targets(["attention"])) < set(lora_targets(["linear"])) < set(lora_targets(["all"]))
    assert lora_targets(["attention", "to_q", "conv_in"]) == ["to_q", "to_k", "to_v", "to_out.0", "conv_in"]


@pytest.mark.parametrize("targets", [["attention"], ["linear"], ["all"], ["to_k", "conv_in"]])
def test_only_the_lora_is_trained_and_starts_as_nothing(unet, inputs, targets):
    tuned = copy.deepcopy(unet)
    add_lora(tuned, rank=4, alpha=8, targets=targets)
    trained = [n for n, p in tuned.named_parameters() if p.requires_grad]
    assert trained and all("lora" in n for n in trained)
    endings = {e for e in lora_targets(targets) if any(f"{e}.lora_A" in n for n in trained)}
    if targets in (["attention"], ["to_k", "conv_in"]):
        assert endings == set(lora_targets(targets))
    if targets == ["all"]:
        assert {"conv1", "conv_shortcut", "to_q", "time_emb_proj", "ff.net.2"} <= endings
        assert any("downsamplers.0.conv.lora_A" in n for n in trained)
    torch.testing.assert_close(Denoiser(tuned, inputs[2])(*inputs[:2]), Denoiser(unet, inputs[2])(*inputs[:2]))


def test_targets_that_are_not_there_are_named(unet):
    for targets in (["to_x"], ["attention", "to_x"], []):
        with pytest.raises(ModelError, match="--lora_targets: no module of this UNet is named"):
            add_lora(copy.deepcopy(unet), rank=4, alpha=4, targets=targets)


def test_weights_that_train_are_kept_in_float32(miniature):
    half = load_unet(miniature, dtype=torch.bfloat16)
    add_lora(half, rank=4, alpha=4, targets=["attention"])
    for name, p in half.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
    full = load_unet(miniature, dtype=torch.bfloat16).requires_grad_(True)
    trainable_to_float32(full)
    assert {p.dtype for p in full.parameters()} == {torch.float32}


# -- the UNet as a function ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(unet):
    generator = torch.Generator().manual_seed(0)
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    conditioning = Conditioning(
        torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator),
        torch.randn(2, pooled, generator=generator),
        torch.tensor([[427.0, 641, 3, 17, 64, 64], [64, 64, 0, 0, 64, 64]]),
    )
    return torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([3, 900]), conditioning


def test_every_part_of_the_conditioning_reaches_the_unet(unet, inputs):
    x_t, t, conditioning = inputs
    want = Denoiser(unet, conditioning)(x_t, t)
    assert want.shape == x_t.shape
    for name in ("prompt_embeds", "pooled", "time_ids"):
        changed = copy.copy(conditioning)
        setattr(changed, name, getattr(conditioning, name).flip(0))
        assert (Denoiser(unet, changed)(x_t, t) - want).abs().max() > 1e-4, name
    assert (Denoiser(unet, conditioning)(x_t, t.flip(0)) - want).abs().max() > 1e-3


def test_twice_the_rows_are_the_batch_twice_and_others_are_refused(unet, inputs):
    x_t, t, conditioning = inputs
    denoise = Denoiser(unet, conditioning)
    twice = denoise.repeated(2)(torch.cat([x_t, x_t]), torch.cat([t, t]))
    torch.testing.assert_close(twice, denoise(x_t, t).repeat(2, 1, 1, 1), rtol=1e-4, atol=1e-5)
    for rows in ([], [0], [0, 1, 0, 1], [0, 1, 0, 1, 0, 1]):
        with pytest.raises(ValueError, match="rows with conditioning for"):
            denoise(x_t[rows], t[rows])


def test_rows_are_told_what_those_of_the_batch_are(unet, inputs):
    x_t, t, conditioning = inputs
    denoise = Denoiser(unet, conditioning)
    whole = denoise(x_t, t)
    torch.testing.assert_close(denoise.rows(slice(1))(x_t[:1], t[:1]), whole[:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(denoise.rows([1])(x_t[1:], t[1:]), whole[1:], rtol=1e-4, atol=1e-5)
    both = denoise.rows([1]).followed_by(conditioning.rows([0]))(x_t.flip(0), t.flip(0))
    torch.testing.assert_close(both, whole.flip(0), rtol=1e-4, atol=1e-5)


def test_sizes_keep_their_value_in_half_precision(inputs):
    half = inputs[2].to("cpu", torch.bfloat16)
    assert half.prompt_embeds.dtype == half.pooled.dtype == torch.bfloat16
    assert half.time_ids.dtype == torch.float32 and half.time_ids[0].tolist() == [427, 641, 3, 17, 64, 64]


def test_a_half_precision_unet_gets_half_precision_latents(miniature, inputs, unet):
    x_t, t, conditioning = inputs
    half = load_unet(miniature, dtype=torch.bfloat16).requires_grad_(False)
    got = Denoiser(half, conditioning.to("cpu", torch.bfloat16), torch.bfloat16)(x_t, t)
    assert got.dtype == torch.bfloat16
    want = Denoiser(unet, conditioning)(x_t, t)
    assert (got.float() - want).abs().mean() < 0.05 * want.abs().mean()
