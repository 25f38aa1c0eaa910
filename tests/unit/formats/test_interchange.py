"""Kohya's format there and back, bit for bit; whole models in the original layout; and what each refuses."""

import copy
import hashlib
import json
import os

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdxl_ambient.errors import InterchangeError
from sdxl_ambient.export import main
from sdxl_ambient.formats import export
from sdxl_ambient.formats.adapter import peft_file
from sdxl_ambient.formats.attach import attach, start_from
from sdxl_ambient.formats.kohya import to_kohya
from sdxl_ambient.formats.names import SDXL_UNET, unet_names, unet_shapes
from sdxl_ambient.formats.original import original_text_encoder, original_text_encoder_2, original_unet, original_vae
from sdxl_ambient.formats.peft import load_lora_state, lora_state, save_lora, save_unet
from sdxl_ambient.formats.read import from_kohya, read_adapter
from sdxl_ambient.formats.record import read_training_info
from sdxl_ambient.models.load import load_unet
from sdxl_ambient.models.lora import LORA_TARGETS, add_lora, add_text_lora
from sdxl_ambient.pipeline import load_pipeline
from sdxl_ambient.provenance import hash_file

LORA = "pytorch_lora_weights.safetensors"
INFO = {"t_n": 437, "low_noise": "skip", "base_model": "pipeline", "data": "0123abcd", "finetune": "lora", "step": 7}
PARTS = ("unet", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads wait for each other longer than such small layers take, on a machine that has more to do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomize(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
        elif "lora_" in name:
            p.data *= 1 + 0.2 * torch.rand(p.shape, generator=generator)


def adapted(unet, seed=0, **keywords):
    """A copy of the UNet with a LoRA whose every weight is as if trained."""
    tuned = copy.deepcopy(unet)
    keywords = {"r": 4, "lora_alpha": 6, "target_modules": [*LORA_TARGETS["all"], "conv_in", "linear_1"], **keywords}
    tuned.add_adapter(LoraConfig(**keywords))
    randomize(tuned, seed)
    return tuned.eval()


# Ranks and alphas that differ by kind of module, and for one module only.
PATTERNS = dict(
    rank_pattern={"conv1": 2, "to_k": 3},
    alpha_pattern={"to_q": 0.3, "conv2": 9, "mid_block.attentions.0.proj_in": 1.7},
)
KINDS = {
    "plain": dict(),
    "patterns": PATTERNS,
    "rslora": dict(use_rslora=True, lora_alpha=5, r=3),
    "dora": dict(use_dora=True, **PATTERNS),
}


@pytest.fixture(scope="module")
def tuned(unet):
    return {kind: adapted(unet, seed, **keywords) for seed, (kind, keywords) in enumerate(KINDS.items())}


@pytest.fixture(scope="module")
def loras(tuned, tmp_path_factory):
    """Our own files of each kind. Not to be changed."""
    folder = tmp_path_factory.mktemp("loras")
    for kind, model in tuned.items():
        save_lora(model, folder / kind, INFO)
    return folder


@pytest.fixture(scope="module")
def config(unet):
    return dict(unet.config)


@torch.no_grad()
def output(unet):
    generator = torch.Generator().manual_seed(9)
    noise, prompt = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 77, 80, generator=generator)
    pooled = torch.randn(2, unet.config.projection_class_embeddings_input_dim - 6 * 32, generator=generator)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    return unet.eval()(noise, 300, prompt, added_cond_kwargs=added).sample


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def write(path, state, metadata=None):
    save_file(state, path, metadata=metadata)
    return path


def strengths(model):
    """Module → rank and the factor that peft applies."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            (adapter,) = layer.lora_A
            found[name] = layer.r[adapter], layer.scaling[adapter]
    return found


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["sgm", "diffusers"])
@pytest.mark.parametrize("kind", KINDS)
def test_kohyas_format_and_back_is_the_same_lora(unet, tuned, loras, config, tmp_path, kind, layout):
    state, metadata = to_kohya(loras / kind, layout, config=config)
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
    state, _ = to_kohya(loras / kind, config=config)
    names = unet_names("sgm", config)
    for module, (rank, factor) in strengths(tuned[kind]).items():
        assert len(state[f"{names[module]}.lora_down.weight"]) == rank
        assert float(state[f"{names[module]}.alpha"]) / rank == pytest.approx(factor, rel=1e-15)
        assert state[f"{names[module]}.alpha"].shape == ()
    assert len({float(v) for k, v in state.items() if k.endswith(".alpha")}) == (4 if "alpha_pattern" in KINDS[kind] else 1)


@pytest.mark.parametrize("kind", ["plain", "patterns", "rslora"])
def test_an_exported_lora_draws_as_the_trained_one_does(miniature, unet, tuned, loras, config, tmp_path, kind):
    want = output(tuned[kind])
    file = write(tmp_path / "style.safetensors", *to_kohya(loras / kind, config=config))
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
    file = write(tmp_path / "style.safetensors", *to_kohya(loras / "dora", config=config))
    (tmp_path / "peft").mkdir()
    write(tmp_path / "peft" / LORA, *peft_file(from_kohya(file, config)))
    got, want = output(load_pipeline(str(miniature), lora=tmp_path / "peft").unet), output(tuned["dora"])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("kind", ["patterns", "dora"])
def test_the_formats_definition_gives_pefts_merged_weights(unet, tuned, loras, config, kind):
    """In closed form, float64: W + (alpha/rank)·up·down, with DoRA scaled to length m per output."""
    state, _ = to_kohya(loras / kind, config=config)
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


@pytest.fixture(scope="module")
def all_parts(miniature, tmp_path_factory):
    """A pipeline with peft's own LoRA of all three parts, and its file as diffusers saves it."""
    pipe, folder = load_pipeline(str(miniature)), tmp_path_factory.mktemp("all_parts")
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"]))
    for model in (pipe.text_encoder, pipe.text_encoder_2):
        targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
        patterns = dict(rank_pattern={"fc1": 2}, alpha_pattern={"q_proj": 9, "fc2": 1})
        model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets, **patterns))
    for seed, part in enumerate(PARTS):
        randomize(getattr(pipe, part), seed)
    layers, metadata = {}, {}
    for part in PARTS:
        model = getattr(pipe, part)
        name = "default" if part == "unet" else next(iter(model.peft_config))
        found = {k: sorted(v) if isinstance(v, set) else v for k, v in model.peft_config[name].to_dict().items()}
        state = interchange_state(model, name)
        layers[f"{part}_lora_layers"], metadata[f"{part}_lora_adapter_metadata"] = state, found
    StableDiffusionXLPipeline.save_lora_weights(str(folder), **layers, **metadata)
    return pipe, folder


def interchange_state(model, adapter):
    from peft.utils import get_peft_model_state_dict

    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


@torch.no_grad()
def all_outputs(pipe):
    prompt, _, pooled, _ = pipe.encode_prompt(["red apple", "penguin"], do_classifier_free_guidance=False)
    return prompt, pooled, output(pipe.unet)


@pytest.mark.parametrize("layout", ["sgm", "diffusers"])
def test_text_encoders_go_along(miniature, all_parts, config, tmp_path, layout):
    pipe, folder = all_parts
    state, metadata = to_kohya(folder, layout, config=config)
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
    file = write(tmp_path / "style.safetensors", *to_kohya(saved, config=config))
    again = from_kohya(file, config)
    assert_same(again.peft_state(), load_file(saved))
    assert any(name.startswith("text_encoder.") and "magnitude" in name for name in again.peft_state())
    (tmp_path / "peft").mkdir()
    write(tmp_path / "peft" / LORA, *peft_file(again))
    want = all_outputs(pipe)
    for folder in ("ours", "peft"):
        for got, wanted in zip(all_outputs(load_pipeline(str(miniature), lora=tmp_path / folder)), want, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


# -- names --------------------------------------------------------------------------------------------------------------

# As they stand in LoRAs that kohya's scripts make, and in ComfyUI's tables.
DOCUMENTED = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj": "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj",
    "down_blocks.2.attentions.0.proj_out": "input_blocks_7_1_proj_out",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.downsamplers.0.conv": "input_blocks_6_0_op",
    "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
    "down_blocks.2.resnets.0.conv_shortcut": "input_blocks_7_0_skip_connection",
    "mid_block.resnets.0.conv2": "middle_block_0_out_layers_3",
    "mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0": "middle_block_1_transformer_blocks_9_attn2_to_out_0",
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "up_blocks.0.attentions.2.proj_in": "output_blocks_2_1_proj_in",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
    "up_blocks.1.attentions.2.transformer_blocks.1.ff.net.2": "output_blocks_5_1_transformer_blocks_1_ff_net_2",
    "up_blocks.2.resnets.2.conv_shortcut": "output_blocks_8_0_skip_connection",
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
}


def test_every_module_of_the_real_sdxl_has_its_name_and_none_collide():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_UNET)
    modules = {n for n, m in unet.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    names = {layout: unet_names(layout) for layout in ("sgm", "diffusers")}
    assert len(modules) == 794 and all(set(n) == modules for n in names.values())
    for module, name in DOCUMENTED.items():
        assert names["sgm"][module] == f"lora_unet_{name}"
        assert names["diffusers"][module] == f"lora_unet_{module.replace('.', '_')}"
    # No name means one module in one layout and another in the other.
    both = [{kohya: module for module, kohya in n.items()} for n in names.values()]
    assert all(both[0][k] == both[1][k] for k in both[0].keys() & both[1].keys())
    # diffusers, which reads the same format, finds each.
    state = {}
    for i, module in enumerate(sorted(modules)):
        for kind in ("down", "up"):
            state[f"{names['sgm'][module]}.lora_{kind}.weight"] = torch.tensor(float(i))
    converted, _ = StableDiffusionXLPipeline.lora_state_dict(state, unet_config=unet.config)
    found = {int(v): k for k, v in convert_unet_state_dict_to_peft(converted).items() if ".lora_A" in k}
    assert found == {i: f"unet.{module}.lora_A.weight" for i, module in enumerate(sorted(modules))}


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


def StableDiffusionXLVae():
    from diffusers import AutoencoderKL

    widths = (128, 256, 512, 512)
    down, up = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    return AutoencoderKL(
        down_block_types=down, up_block_types=up, block_out_channels=widths, layers_per_block=2, latent_channels=4
    )


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


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


# -- what the files say -------------------------------------------------------------------------------------------------


def metadata_of(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def test_our_own_files_say_what_they_are(loras):
    said = metadata_of(loras / "plain" / LORA)
    assert said["modelspec.sai_model_spec"] == "1.0.0"
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert said["modelspec.implementation"] == "diffusers" and "437" in said["modelspec.title"]
    assert said["modelspec.timestep_range"] == "438,999"
    assert said["sdxl_ambient.t_n"] == "437" and said["sdxl_ambient.store.reader"] == "0123abcd"
    assert said["sdxl_ambient.objective"] == "ambient, skip at t <= t_n" and said["sdxl_ambient.base_model"] == "pipeline"
    assert json.loads(said["lora_adapter_metadata"])["unet.r"] == 4


def test_kohyas_keys_and_modelspecs(loras, config):
    _, said = to_kohya(loras / "patterns", config=config, title="Emoji", date="2025-01-02")
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
    _, dora = to_kohya(loras / "dora", config=config)
    assert dora["ss_network_module"] == "lycoris.kohya" and json.loads(dora["ss_network_args"])["dora_wd"] == "True"


def test_nothing_of_the_noise_key_is_written(unet, config, tmp_path):
    tuned = adapted(unet, target_modules=["to_q"])
    save_lora(tuned, tmp_path, {**INFO, "noise_key_file": "/secret/place", "key_id": "c0ffee"})
    save_unet(tuned, tmp_path / "full", {**INFO, "noise_key_file": "/secret/place", "key_id": "c0ffee"})
    records = [(tmp_path / d / "training.json").read_text() for d in (".", "full")]
    for said in (metadata_of(tmp_path / LORA), to_kohya(tmp_path, config=config)[1], *records):
        assert not any(secret in str(said) for secret in ("secret", "c0ffee", "key_id"))


@pytest.mark.parametrize(
    ("info", "wanted"),
    [
        ({}, {"t_n": None, "objective": None}),
        ({"t_n": None, "low_noise": "skip"}, {"t_n": "none", "objective": "denoising"}),
        ({"t_n": "mixed", "low_noise": "skip"}, {"t_n": "mixed", "objective": "ambient, skip at t <= t_n"}),
        ({"t_n": 300, "low_noise": "restore"}, {"t_n": "300", "objective": "ambient, restore at t <= t_n"}),
    ],
)
def test_what_is_known_is_said_and_nothing_else(info, wanted):
    from sdxl_ambient.formats.record import model_metadata

    said = model_metadata(info, "a", "b")
    assert {k: said.get(f"sdxl_ambient.{k}") for k in wanted} == wanted
    assert not {"modelspec.timestep_range", "modelspec.date", "modelspec.resolution"} & said.keys()
    more = model_metadata({**info, "resolution": 64, "prediction_type": "v_prediction"}, "a", "b")
    assert more["modelspec.resolution"] == "64x64" and more["modelspec.prediction_type"] == "v"
    assert model_metadata({"resolution": [640, 512]}, "a", "b")["modelspec.resolution"] == "640x512"


# -- what can't be converted --------------------------------------------------------------------------------------------


def change(state, **tensors):
    return {**state, **tensors}


NAME = "lora_unet_middle_block_1_proj_in"
DOWN, UP, ALPHA = (f"{NAME}.{k}" for k in ("lora_down.weight", "lora_up.weight", "alpha"))
SAME = "lora_unet_mid_block_attentions_0_proj_in"
BAD = {
    "another kind": (lambda s: change(s, **{f"{NAME}.hada_w1_a": torch.ones(1)}), "other kinds can't be converted"),
    "Tucker": (lambda s: change(s, **{f"{NAME}.lora_mid.weight": torch.ones(1)}), "other kinds can't be converted"),
    "no such module": (lambda s: change(s, **{DOWN.replace("_1_", "_7_"): torch.ones(1)}), "is no module of the base"),
    "text projection": (lambda s: change(s, **{"lora_te2_text_projection.alpha": torch.ones(())}), "is no module of the"),
    "two layouts": (lambda s: change(s, **{f"{SAME}.alpha": torch.ones(())}), "mixes two layouts"),
    "half a pair": (lambda s: {k: v for k, v in s.items() if k != UP}, "no up weight; the file is incomplete"),
    "another size": (lambda s: change(s, **{DOWN: s[DOWN][:, :5].contiguous()}), "don't fit the base model's UNet"),
    "another rank": (lambda s: change(s, **{DOWN: s[DOWN][:1].contiguous()}), "don't fit"),
    "no alpha that is a number": (lambda s: change(s, **{ALPHA: torch.tensor(float("nan"))}), "alpha = nan"),
    "part DoRA": (lambda s: change(s, **{f"{NAME}.dora_scale": torch.ones(96, 1)}), "peft has all or none"),
    "DoRA of inputs": (lambda s: change(s, **{f"{NAME}.dora_scale": torch.ones(1, 96)}), "those of its inputs"),
    "nothing": (lambda s: {"lora_unet_x": torch.ones(1)}, "is no weight of a LoRA"),
    "a UNet": (lambda s: {"conv_in.weight": torch.ones(1)}, "is not in kohya's format"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_can_not_be_converted_whole_is_refused(loras, config, tmp_path, case):
    build, message = BAD[case]
    state, _ = to_kohya(loras / "plain", config=config)
    file = write(tmp_path / "x.safetensors", build(state))
    with pytest.raises(InterchangeError, match=message) as error:
        from_kohya(file, config)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def with_metadata(loras, tmp_path, **changes):
    file = loras / "plain" / LORA
    said = metadata_of(file)
    described = {**json.loads(said["lora_adapter_metadata"]), **{f"unet.{k}": v for k, v in changes.items()}}
    return write(tmp_path / LORA, load_file(file), {**said, "lora_adapter_metadata": json.dumps(described)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "the unet's adapter is LOHA, not a LoRA"),
        ({"lora_bias": True}, "lora_bias = True, for which kohya's format has no name"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save"),
        ({"r": 5}, "of rank 4, but of rank 5 by its configuration"),
    ],
)
def test_an_adapter_that_the_format_can_not_hold_is_refused(loras, config, tmp_path, changes, message):
    with pytest.raises(InterchangeError, match=message):
        to_kohya(with_metadata(loras, tmp_path, **changes), config=config)


def test_a_lora_of_another_size_asks_for_its_base_model(loras):
    with pytest.raises(InterchangeError, match="SDXL .of another size. then give --pretrained_model_name_or_path"):
        to_kohya(loras / "plain")


def test_without_alpha_or_configuration_the_factor_is_one(loras, config, tmp_path):
    state, _ = to_kohya(loras / "patterns", config=config)
    file = write(tmp_path / "a.safetensors", {k: v for k, v in state.items() if not k.endswith(".alpha")})
    bare = write(tmp_path / "b.safetensors", load_file(loras / "patterns" / LORA))
    for adapter in (from_kohya(file, config), read_adapter(bare, config)):
        assert all(w.alpha == w.rank for w in adapter.parts["unet"].values()) and adapter.info == {}


# -- precision ----------------------------------------------------------------------------------------------------------


def test_a_precision_is_stored_and_alphas_stay_exact(loras, config):
    short, _ = to_kohya(loras / "patterns", config=config, dtype=torch.bfloat16)
    full, _ = to_kohya(loras / "patterns", config=config)
    for name, tensor in short.items():
        if name.endswith(".alpha"):
            assert torch.equal(tensor, full[name]) and tensor.dtype in (torch.float32, torch.float64)
        else:
            assert torch.equal(tensor, full[name].bfloat16())


@pytest.mark.parametrize(("kind", "count"), [("plain", 0), ("patterns", 1), ("dora", 2), ("rslora", 0)])
def test_what_other_programs_read_otherwise_is_said(loras, config, kind, count):
    said = export.notes(read_adapter(loras / kind, config))
    assert len(said) == count and ("ComfyUI divides" in "".join(said)) == (kind == "dora")


def test_values_too_large_for_a_precision_are_refused(loras, config):
    adapter = read_adapter(loras / "plain", config)
    adapter.parts["unet"]["conv_in"].up[0, 0] = 1e6
    with pytest.raises(InterchangeError, match="too large for float16; take bfloat16"):
        to_kohya(adapter, config=config, dtype=torch.float16)


# -- training from a LoRA of elsewhere ----------------------------------------------------------------------------------


def test_training_goes_on_from_a_kohya_lora(unet, tuned, loras, config, tmp_path):
    """Trainable, saved as any of ours, and resumed into another that was begun from the same file."""
    file = write(tmp_path / "style.safetensors", *to_kohya(loras / "patterns", config=config, dtype=torch.float16))
    adapter = from_kohya(file, config)
    ours, fresh = copy.deepcopy(unet), copy.deepcopy(unet)
    attach(ours, adapter)
    assert all(p.requires_grad == ("lora_" in n) for n, p in ours.named_parameters())
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    torch.testing.assert_close(output(ours), output(tuned["patterns"]), rtol=1e-2, atol=1e-2)
    for p in ours.parameters():
        if p.requires_grad:
            p.data += 0.01
    saved = save_lora(ours, tmp_path / "trained", INFO)
    attach(fresh, from_kohya(file, config), dropout=0.1)
    load_lora_state(fresh, saved)
    assert torch.equal(output(fresh), output(ours))
    read = read_adapter(saved, config)
    assert {n: w.alpha for n, w in read.parts["unet"].items()} == {n: w.alpha for n, w in adapter.parts["unet"].items()}


@pytest.mark.parametrize("kind", ["ours", "folder", "kohya", "diffusers"])
def test_training_starts_from_any_format(unet, tuned, loras, config, tmp_path, kind):
    like = "plain" if kind == "diffusers" else "patterns"
    file, want = loras / like / LORA, output(tuned[like])
    if kind == "kohya":
        file = write(tmp_path / "style.safetensors", *to_kohya(file, config=config))
    if kind == "diffusers":
        # As its training scripts wrote them for long: other names, and no strength, which is 1.
        state = {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for k, v in load_file(file).items()}
        file = write(tmp_path / "theirs.safetensors", state)
        want = output(adapted(unet, 0, lora_alpha=4))
    ours = copy.deepcopy(unet)
    record = start_from(ours, loras / like if kind == "folder" else file, dropout=0.1)
    assert record == {"lora": hash_file(file)}
    torch.testing.assert_close(output(ours), want, rtol=1e-5, atol=1e-5)
    assert ours.peft_config["default"].lora_dropout == 0.1


@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_training_starts_from_a_lora_of_all_parts(unet, all_parts, config, miniature, tmp_path, kind):
    pipe, folder = all_parts
    file = write(tmp_path / "all.safetensors", *to_kohya(folder / LORA, config=config)) if kind == "kohya" else folder / LORA
    fresh = load_pipeline(str(miniature))
    encoders = fresh.text_encoder, fresh.text_encoder_2
    start_from(fresh.unet, file, encoders)
    for ours, theirs in zip(all_outputs(fresh), all_outputs(pipe), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    trained = {n for encoder in encoders for n, p in encoder.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    # SDXL never reads the first encoder's last layer.
    last = f"layers.{fresh.text_encoder.config.num_hidden_layers - 1}."
    assert not any(p.requires_grad for n, p in fresh.text_encoder.named_parameters() if last in n)
    assert any(p.requires_grad for n, p in fresh.text_encoder_2.named_parameters() if last in n)
    # Saved, it is what it was; and a resume finds the same weights to load.
    saved = save_lora(fresh.unet, tmp_path / "out", INFO, encoders)
    load_lora_state(fresh.unet, saved, encoders)
    again = read_adapter(saved, config)
    assert {p: {n: w.alpha for n, w in again.parts[p].items()} for p in PARTS} == {
        p: {n: w.alpha for n, w in read_adapter(file, config).parts[p].items()} for p in PARTS
    }


def test_text_encoders_that_a_lora_says_nothing_of_get_a_new_one(unet, loras, miniature):
    pipe = load_pipeline(str(miniature))
    encoders = pipe.text_encoder, pipe.text_encoder_2
    start_from(pipe.unet, loras / "plain", encoders)
    assert not any("lora_" in name for encoder in encoders for name, _ in encoder.named_parameters())
    add_text_lora(encoders, rank=2, alpha=2)
    count = sum("lora_" in name for encoder in encoders for name, _ in encoder.named_parameters())
    add_text_lora(encoders, rank=3, alpha=2)
    assert count == sum("lora_" in name for encoder in encoders for name, _ in encoder.named_parameters()) > 0


def test_a_half_precision_base_does_not_round_the_lora(miniature, tuned, loras):
    half = load_unet(miniature, dtype=torch.bfloat16)
    start_from(half, loras / "dora")
    assert_same(lora_state(half), lora_state(tuned["dora"]))


def test_a_lora_that_training_can_not_start_from_is_one_line(unet, loras, all_parts, tmp_path):
    file = write(tmp_path / "cut.safetensors", load_file(loras / "plain" / LORA))
    file.write_bytes(file.read_bytes()[:-8])
    other = write(tmp_path / "other.safetensors", {"lora_unet_nowhere.lora_down.weight": torch.ones(1, 1)})
    cases = [
        (all_parts[1], "weights of text_encoder and text_encoder_2; .* --train_text_encoder"),
        (file, "can't be read"),
        (other, "no module of the base"),
    ]
    for path, message in [*cases, (tmp_path / "nothing", "no .*nothing"), (tmp_path, "holds 2 LoRA files; give one")]:
        fresh = copy.deepcopy(unet)
        with pytest.raises(InterchangeError, match=f"--lora: .*{message}") as error:
            start_from(fresh, path)
        assert "\n" not in str(error.value) and not hasattr(fresh, "peft_config")


# -- full fine-tunes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_run(unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    model = copy.deepcopy(unet)
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.data += 0.01 * torch.randn(p.shape, generator=generator)
    save_unet(model, folder, {**INFO, "finetune": "full"})
    return folder, model


def run(*arguments):
    return main([str(a) for a in arguments])


def test_a_pipeline_folder_is_the_base_with_our_unet(miniature, full_run, tmp_path, capsys):
    folder, model = full_run
    out = tmp_path / "pipeline"
    base = ("--pretrained_model_name_or_path", miniature)
    assert run("--unet", folder, *base, "--format", "pipeline", "--output", out) == 0
    assert "a pipeline of scheduler, text_encoder, text_encoder_2, tokenizer" in capsys.readouterr().out
    pipe, plain = (StableDiffusionXLPipeline.from_pretrained(p, add_watermarker=False) for p in (out, miniature))
    assert_same(pipe.unet.state_dict(), model.state_dict())
    for part in ("vae", "text_encoder", "text_encoder_2"):
        assert_same(getattr(pipe, part).state_dict(), getattr(plain, part).state_dict())
    assert pipe.scheduler.config == plain.scheduler.config and pipe.tokenizer_2.vocab == plain.tokenizer_2.vocab
    assert {p.suffix for p in out.rglob("*") if p.is_file()} == {".json", ".safetensors"}
    assert read_training_info(out)["t_n"] == 437
    assert [p.name for p in tmp_path.iterdir()] == ["pipeline"]


def test_pickles_and_variants_are_left_behind(miniature, full_run, tmp_path):
    base = tmp_path / "base"
    for source in miniature.rglob("*.*"):
        if source.is_file():
            (base / source.relative_to(miniature)).parent.mkdir(parents=True, exist_ok=True)
            os.link(source, base / source.relative_to(miniature))
    for name in ("vae/diffusion_pytorch_model.bin", "text_encoder/model.fp16.safetensors", "unet/flax_model.msgpack"):
        (base / name).write_bytes(b"x")
    out = tmp_path / "out"
    options = ("--unet", full_run[0] / "unet", "--pretrained_model_name_or_path", base, "--format")
    assert run(*options, "pipeline", "--output", out) == 0
    names = {p.name for p in out.rglob("*")}
    assert not names & {"diffusion_pytorch_model.bin", "model.fp16.safetensors", "flax_model.msgpack"}
    (base / "vae/diffusion_pytorch_model.safetensors").unlink()
    assert run(*options, "pipeline", "--output", tmp_path / "no") == 2
    assert run(*options, "single_file", "--output", tmp_path / "no.safetensors") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


def test_a_single_file_gives_back_all_parts(miniature, full_run, tmp_path):
    folder, model = full_run
    out = tmp_path / "sdxl.safetensors"
    base = ("--pretrained_model_name_or_path", miniature)
    assert run("--unet", folder, *base, "--format", "single_file", "--output", out) == 0
    pipe = StableDiffusionXLPipeline.from_single_file(
        str(out), config=str(miniature), local_files_only=True, add_watermarker=False
    )
    plain = StableDiffusionXLPipeline.from_pretrained(miniature, add_watermarker=False)
    assert_same(pipe.unet.state_dict(), model.state_dict())
    for part in ("vae", "text_encoder", "text_encoder_2"):
        assert_same(getattr(pipe, part).state_dict(), getattr(plain, part).state_dict())
    assert_same(load_pipeline(str(miniature), unet=out).unet.state_dict(), model.state_dict())
    said = metadata_of(out)
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base" and said["modelspec.prediction_type"] == "epsilon"
    assert said["modelspec.resolution"] == "64x64" and said["sdxl_ambient.t_n"] == "437"
    # And the file as a --unet again, into a folder.
    assert run("--unet", out, *base, "--format", "pipeline", "--output", tmp_path / "again") == 0
    assert_same(load_unet(tmp_path / "again").state_dict(), model.state_dict())


def test_a_single_file_in_half_precision_that_predicts_v(miniature, full_run, tmp_path):
    base = tmp_path / "base"
    assert (
        run(*("--unet", full_run[0], "--pretrained_model_name_or_path", miniature, "--format", "pipeline", "--output", base))
        == 0
    )
    scheduler = base / "scheduler/scheduler_config.json"
    described = json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler.write_text(json.dumps(described))
    out = tmp_path / "v.safetensors"
    options = ("--unet", base, "--pretrained_model_name_or_path", base, "--format", "single_file", "--output", out)
    assert run(*options, "--dtype", "float16") == 0
    state = load_file(out)
    assert {"v_pred", "ztsnr"} <= state.keys() and metadata_of(out)["modelspec.prediction_type"] == "v"
    want = {k: v.half() for k, v in full_run[1].state_dict().items()}
    assert_same(load_pipeline(str(base), unet=out, dtype=torch.float16).unet.state_dict(), want)
    assert {v.dtype for k, v in state.items() if k not in ("v_pred", "ztsnr")} == {torch.float16}
    # Of a UNet that is known to predict another quantity than the base's scheduler says, neither is made.
    (base / "training.json").write_text(json.dumps({**INFO, "prediction_type": "epsilon"}))
    assert run(*options[:-1], tmp_path / "w.safetensors") == 2


def test_a_unet_of_another_architecture_is_refused(miniature, full_run, tmp_path, capsys):
    folder = tmp_path / "unet"
    full_run[1].save_pretrained(folder)
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    state["conv_out.bias"] = torch.ones(9)
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    options = ("--unet", folder, "--pretrained_model_name_or_path", miniature, "--format", "pipeline")
    assert run(*options, "--output", tmp_path / "out") == 2
    assert "1 weights differ, such as conv_out.bias" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- the command line ---------------------------------------------------------------------------------------------------


def test_the_command_line_there_and_back(miniature, loras, tmp_path, capsys):
    file, back = tmp_path / "style.safetensors", tmp_path / "back"
    base = ("--pretrained_model_name_or_path", miniature)
    assert run("--lora", loras / "patterns", *base, "--format", "kohya", "--output", file, "--title", "Emoji") == 0
    said = capsys.readouterr().out
    assert "132 modules of unet, rank 2 to 4, alpha 0.3 to 9" in said and f"{file.stat().st_size:,} bytes" in said
    assert "note: diffusers mistakes alphas that differ" in said and "DoRA" not in said
    assert run("--lora", file, *base, "--format", "peft", "--output", back) == 0
    assert "note" not in capsys.readouterr().out
    assert_same(load_file(back / LORA), load_file(loras / "patterns" / LORA))
    assert read_training_info(back) == INFO
    assert sorted(p.name for p in back.iterdir()) == [LORA, "training.json"]
    for path in (file, back / LORA):
        content = path.read_bytes()
        digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
        assert metadata_of(path)["modelspec.hash_sha256"] == f"0x{digest}"
        assert metadata_of(path)["sshs_model_hash"] == digest
    assert metadata_of(file)["modelspec.title"] == "Emoji"
    # Neither is written over, nor is anything left beside them.
    for output, kind in ((file, "kohya"), (back, "peft")):
        with pytest.raises(SystemExit) as stop:
            run("--lora", loras / "plain", *base, "--format", kind, "--output", output)
        assert stop.value.code == 2 and "exists already" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "style.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--format kohya --output x.safetensors", "give --lora or --unet, one of them"),
        ("--lora {lora} --unet {lora} --format kohya --output x.safetensors", "give --lora or --unet, one of them"),
        ("--lora {lora} --output x", "--format: a value is required"),
        ("--lora {lora} --format kohya", "--output: a value is required"),
        ("--lora {lora} --format kohya --output x", "must end in .safetensors"),
        ("--lora {lora} --format pipeline --output x", "'pipeline' can't be made of a lora; kohya, peft can"),
        ("--unet {lora} --format kohya --output x", "'kohya' can't be made of a unet; pipeline, single_file can"),
        ("--unet {lora} --format pipeline --output x", "--pretrained_model_name_or_path: a value is required"),
        ("--unet {lora} --pretrained_model_name_or_path b --format pipeline --output x --dtype float16", "--dtype: a pip"),
        ("--lora gone --format peft --output x", "--lora: 'gone' does not exist"),
        ("--lora {lora} --format peft --output x --layout other", "'other' is not one of sgm, diffusers"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(loras, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "read_adapter", lambda *a: pytest.fail("loaded"))
    with pytest.raises(SystemExit) as stop:
        run(*arguments.format(lora=loras / "plain").split())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_failed_conversion_is_one_line_and_leaves_nothing(miniature, loras, tmp_path, capsys, monkeypatch):
    out = tmp_path / "x.safetensors"
    assert run("--lora", loras / "plain", "--format", "kohya", "--output", out) == 2  # of SDXL's own size it is not
    said = capsys.readouterr().err
    assert said.startswith("sdxl_ambient.export: error:") and said.count("\n") == 1 and not list(tmp_path.iterdir())

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    base = ("--lora", loras / "plain", "--pretrained_model_name_or_path", miniature, "--output")
    assert run(*base, out, "--format", "kohya") == run(*base, tmp_path / "d", "--format", "peft") == 2
    assert "No space left" in capsys.readouterr().err and not list(tmp_path.iterdir())
