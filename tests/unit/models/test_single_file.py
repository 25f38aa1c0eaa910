"""One .safetensors file is a base like any other: in training, encoding, preview, loop and evaluation, without a network."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.running import arguments
from support.v_base import make_v_base

from eval.generate import main as generate
from sdxl_ambient.errors import ModelError
from sdxl_ambient.export import main as export
from sdxl_ambient.formats.original import original_vae
from sdxl_ambient.latents import main as encode
from sdxl_ambient.loop.__main__ import main as loop
from sdxl_ambient.models import (
    check_sdxl,
    encode_prompts,
    load_encoders,
    load_schedule,
    load_unet,
    load_vae,
    tokenize,
    unet_config,
)
from sdxl_ambient.models.single_file import ARCHITECTURES, single_file
from sdxl_ambient.preview.__main__ import main as preview
from train_sdxl_ambient import main as train

UNET = "model.diffusion_model."
CONV_IN, LABELS = f"{UNET}input_blocks.0.0.weight", f"{UNET}label_emb.0.0.weight"


def to_file(pipeline, output, *more):
    words = ["--unet", str(pipeline / "unet"), "--pretrained_model_name_or_path", str(pipeline), "--format", "single_file"]
    assert export([*words, "--output", str(output), *more]) == 0
    return output


@pytest.fixture(scope="module")
def whole(miniature, tmp_path_factory):
    """The miniature in one file, as the original release has SDXL."""
    return to_file(miniature, tmp_path_factory.mktemp("whole") / "mini.safetensors")


@pytest.fixture
def changed(whole, tmp_path):
    """The same with some tensors dropped (None), exchanged or added."""

    def make(drop=(), metadata=None, **tensors):
        state = {n: t for n, t in load_file(whole).items() if not n.startswith(tuple(drop))}
        state |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        save_file(state, tmp_path / "changed.safetensors", metadata)
        return tmp_path / "changed.safetensors"

    return make


def test_its_parts_are_those_of_the_folder_bit_for_bit(whole, miniature):
    assert check_sdxl(whole)["force_zeros_for_empty_prompt"] is True
    assert load_schedule(whole).hash == load_schedule(miniature).hash
    assert unet_config(whole)["sample_size"] == unet_config(miniature)["sample_size"]
    ours, theirs = load_encoders(str(whole)), load_encoders(str(miniature))
    networks = [(load_unet(whole), load_unet(miniature)), *zip(ours.networks, theirs.networks, strict=True)]
    for one, other in networks:
        one, other = one.state_dict(), other.state_dict()
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    captions = ["", "a photo of sks dog", "Ein Ölgemälde, 90 cm × 60 cm", "word " * 200]
    assert torch.equal(tokenize(captions, ours.tokenizers), tokenize(captions, theirs.tokenizers))
    for one, other in zip(*(encode_prompts(captions, e.tokenizers, e.text_encoders) for e in (ours, theirs)), strict=True):
        assert torch.equal(one, other)


def test_the_shipped_configurations_are_sdxls_and_the_miniatures(miniature):
    """SDXL's own sizes: 2.567 billion weights in the UNet, and those of the two text encoders and the VAE."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    folder = ARCHITECTURES / "sdxl"
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder="unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae"))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder"))
        text_2 = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder_2"))
    sizes = [sum(p.numel() for p in network.parameters()) for network in (unet, vae, text, text_2)]
    assert sizes == [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]
    assert (vae.config.scaling_factor, len(unet.state_dict())) == (0.13025, 1680)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        folders = ARCHITECTURES / "miniature", miniature
        ours, shipped = (json.loads((folder / part / "config.json").read_text()) for folder in folders)
        assert all(shipped[name] == value for name, value in ours.items())
    ours = json.loads((ARCHITECTURES / "miniature/scheduler/scheduler_config.json").read_text())
    assert ours.items() <= json.loads((miniature / "scheduler/scheduler_config.json").read_text()).items()
    for part in ("tokenizer", "tokenizer_2"):
        for file in (miniature / part).iterdir():
            assert (ARCHITECTURES / part / file.name).read_bytes() == file.read_bytes()


def run_all(base, emoji, work):
    """The latents, the LoRA, the preview and the drawn images that a base gives."""
    home = ["--noise_key_file", str(work / "key")]
    model = ["--pretrained_model_name_or_path", str(base)]
    images = [*model, "--train_data_dir", str(emoji), "--resolution", "64"]
    assert encode([*images, *home, "--output_dir", str(work / "store"), "--t_n", "500"]) == 0
    options = dict(train_data_dir=None, latents_dir=work / "store", noise_key_file=None, pretrained_model_name_or_path=base)
    options |= dict(resolution=None, t_n=None, max_train_steps=2, validation_prompt="a star", num_validation_images=1)
    assert train(arguments(emoji, work / "run", **options, validation_inference_steps=2)) == 0
    assert preview([*images, "--output_dir", str(work / "preview"), "--num_images", "1", "--posterior_samples", "0"]) == 0
    words = [*model, "--latents_dir", str(work / "store"), "--output_dir", str(work / "loop")]
    assert loop([*words, "--t_n", "300", "--steps", "2"]) == 0
    (work / "prompts.txt").write_text("a star\na heart\n")
    drawn = ["--prompts_file", str(work / "prompts.txt"), "--lora", str(work / "run"), "--num_inference_steps", "3"]
    assert generate([*model, *drawn, "--output_dir", str(work / "drawn")]) == 0
    tensors = {f.name: load_file(f) for f in sorted(work.rglob("*.safetensors")) if "checkpoint" not in str(f)}
    pictures = [np.asarray(Image.open(f)) for f in sorted(work.rglob("*.png"))]
    return tensors, pictures, json.loads((work / "run/training.json").read_text())


def test_every_command_makes_the_same_of_it(whole, miniature, emoji, tmp_path, monkeypatch):
    for name in ("folder", "file"):
        (tmp_path / name).mkdir()
    ours = run_all(whole, emoji, tmp_path / "file")
    shutil.copy(tmp_path / "file/key", tmp_path / "folder/key")
    monkeypatch.setenv("SDXL_AMBIENT_HOME", str(tmp_path / "home"))  # where nothing was observed yet
    theirs = run_all(miniature, emoji, tmp_path / "folder")
    assert ours[0].keys() == theirs[0].keys() and len(ours[1]) == len(theirs[1]) > 3
    for name, tensors in ours[0].items():
        assert all(torch.equal(tensors[n], theirs[0][name][n]) for n in tensors), name
    assert all(np.array_equal(one, other) for one, other in zip(ours[1], theirs[1], strict=True))
    assert (ours[2]["base_model"], theirs[2]["base_model"]) == ("mini.safetensors", "pipeline")


def test_a_full_fine_tune_of_it_is_exported_whole(whole, miniature, tmp_path):
    words = ["--unet", str(miniature / "unet"), "--pretrained_model_name_or_path", str(whole), "--output"]
    assert export([*words, str(tmp_path / "again.safetensors"), "--format", "single_file"]) == 0
    one, other = load_file(whole), load_file(tmp_path / "again.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in one)
    assert export([*words, str(tmp_path / "folder"), "--format", "pipeline"]) == 0
    check_sdxl(tmp_path / "folder")
    ours, theirs = load_encoders(str(tmp_path / "folder")), load_encoders(str(miniature))
    captions = ["a red cat", ""]
    for one, other in zip(*(encode_prompts(captions, e.tokenizers, e.text_encoders) for e in (ours, theirs)), strict=True):
        assert torch.equal(one, other)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_a_file_says_that_it_predicts_v(miniature, tmp_path, changed):
    v = to_file(make_v_base(tmp_path / "v", miniature, zero_snr=True), tmp_path / "v.safetensors")
    schedule = load_schedule(v)
    assert schedule.prediction_type == "v_prediction" and schedule.ends_without_signal
    check_sdxl(v)
    marked = changed(metadata={"modelspec.prediction_type": "v"})
    assert load_schedule(marked).prediction_type == "v_prediction"
    assert load_schedule(changed(v_pred=torch.zeros(0))).prediction_type == "v_prediction"


Z = torch.zeros
REFUSED = {
    "EDM, Playground's": (dict(edm_mean=Z(4), edm_std=Z(4)), r"is EDM's \(EDMEulerScheduler\)"),
    "EDM, CosXL": (dict(edm_vpred__sigma_max=Z(1), v_pred=Z(0)), "is EDM's"),
    "inpainting": ({CONV_IN: Z(32, 9, 3, 3)}, "is an inpainting model"),
    "instruct": ({CONV_IN: Z(32, 8, 3, 3)}, "has 8 channels in and 4 out"),
    "LCM": ({f"{UNET}time_embed.cond_proj.weight": Z(32, 256)}, "consistency-distilled one"),
    "zero terminal SNR without v": (dict(ztsnr=Z(0)), "predicts ε and has rescale_betas_zero_snr"),
    "refiner": (
        dict(drop=["conditioner.embedders."], conditioner__embedders__0__model__ln_final__weight=Z(48)), "SDXL refiner",
    ),
    "fewer blocks": (dict(drop=[f"{UNET}middle_block.2."]), "is incomplete or not SDXL's own: it has 320 weights, where"),
    "another width": ({CONV_IN: Z(64, 4, 3, 3)}, "is incomplete or not SDXL's own"),
    "no text encoders": (dict(drop=["conditioner."]), "looks like a UNet alone; .* as --unet"),
    "a VAE": (dict(drop=[UNET, "conditioner."]), "looks like a VAE; give it as --pretrained_vae_model_name_or_path"),
    "SD 1.5": (dict(cond_stage_model__transformer__weight=Z(1)), "holds Stable Diffusion 1 or 2, not SDXL"),
    "SD 3": (dict(model__diffusion_model__joint_blocks__0__weight=Z(1)), "holds Stable Diffusion 3, not SDXL"),
    "Flux": (dict(model__diffusion_model__double_blocks__0__weight=Z(1)), "holds Flux, not SDXL"),
    "LoRA": (dict(drop=[UNET, "conditioner."], lora_unet_x__lora_down__weight=Z(1)), "holds a LoRA, .* --lora"),
    "nothing known": (dict(drop=[UNET, "conditioner.", "first_stage"], weight=Z(1)), "holds no whole SDXL model$"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_another_file_is_refused_in_one_line(changed, case):
    tensors, message = REFUSED[case]
    file = changed(**tensors)
    with pytest.raises(ModelError, match=message) as error:
        check_sdxl(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.ckpt", b"PK\x03\x04 pickled", "only .safetensors files are read, since others can run code"),
        ("model.safetensors", b"<!DOCTYPE html>" * 100, "can't be read: .*header"),
        ("model.safetensors", b"", "can't be read"),
    ],
)
def test_what_is_no_safetensors_file_is_refused_by_every_command(name, content, message, emoji, tmp_path, capsys):
    file, out = tmp_path / name, tmp_path / "out"
    file.write_bytes(content)
    common = ["--pretrained_model_name_or_path", str(file), "--train_data_dir", str(emoji), "--output_dir", str(out)]
    for command in (encode, preview, lambda words: train([*words, "--report_to", "none"])):
        assert command([*common, "--resolution", "64"]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert "error: " in line and str(file) in line
    with pytest.raises(ModelError, match=message):
        check_sdxl(file)
    assert not out.exists() or not any(out.iterdir())


@pytest.mark.parametrize("part", ["text_encoder_2", "vae", "unet", "damaged"])
def test_a_part_that_is_missing_or_damaged_is_named(changed, part):
    if part == "unet":
        file = changed(**{f"{UNET}out.2.weight": torch.full((4, 32, 3, 3), float("nan"))})
        with pytest.raises(ModelError, match="the UNet .* holds NaN or infinity"):
            load_unet(file)
        return
    prefix, message = {
        "text_encoder_2": ("conditioner.embedders.1.model.transformer.resblocks.0.", "second text encoder .* missing"),
        "vae": ("first_stage_model.", "holds none; give one with --pretrained_vae_model_name_or_path"),
        "damaged": ("first_stage_model.decoder.conv_out.", "the VAE of .* incomplete, .* decoder.conv_out.bias is missing"),
    }[part]
    with pytest.raises(ModelError, match=message) as error:
        load_encoders(str(changed(drop=[prefix])))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", ["original, bare", "original, prefixed", "diffusers"])
@pytest.mark.parametrize("base", ["folder", "file"])
def test_a_vae_in_a_file_is_taken_with_the_bases_configuration(layout, base, whole, miniature, tmp_path):
    state = load_file(miniature / "vae/diffusion_pytorch_model.safetensors")
    state["decoder.conv_out.bias"] = state["decoder.conv_out.bias"] + 1
    wanted = {name: tensor.float() for name, tensor in state.items()}
    if layout != "diffusers":
        start = "first_stage_model." if layout.endswith("prefixed") else ""
        state = {start + n.removeprefix("first_stage_model."): t for n, t in original_vae(state, 3).items()}
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "vae.safetensors")
    vae = load_vae({"folder": miniature, "file": whole}[base], str(tmp_path / "vae.safetensors"))
    assert vae.config.scaling_factor == load_vae(miniature).config.scaling_factor
    assert vae.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in vae.state_dict().items())


def test_a_file_is_looked_at_anew_when_it_has_changed(changed):
    assert load_schedule(changed()).prediction_type == "epsilon"
    assert load_schedule(changed(v_pred=Z(0))).prediction_type == "v_prediction"


def test_only_the_header_is_read_to_tell_what_it_is(whole, monkeypatch):
    monkeypatch.setattr("sdxl_ambient.models.single_file.tensors", None)
    assert single_file(whole).folder == ARCHITECTURES / "miniature"
    check_sdxl(whole)


@pytest.mark.parametrize("option", ["variant", "revision"])
def test_a_file_has_no_variant_and_no_revision(whole, emoji, tmp_path, capsys, option):
    words = ["--pretrained_model_name_or_path", str(whole), "--output_dir", str(tmp_path / "out"), f"--{option}", "fp16"]
    (tmp_path / "prompts.txt").write_text("a star\n")
    prompts = ["--prompts_file", str(tmp_path / "prompts.txt")]
    for command, more in ((encode, ["--train_data_dir", str(emoji)]), (generate, prompts)):
        with pytest.raises(SystemExit):
            command([*words, *more])
        assert f"--{option}: 'fp16' can not be had of the single file" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", [f"{UNET}out.2.weight", "first_stage_model.decoder.conv_out.weight"])
def test_weights_are_numbers_with_a_fraction(whole, changed, name, dtype):
    file = changed(**{name: load_file(whole)[name].to(dtype)})
    load = load_unet if name.startswith(UNET) else load_vae
    with pytest.raises(ModelError, match=f"is of {str(dtype).removeprefix('torch.')}, which is no weight's"):
        load(file)


def test_a_file_that_is_gone_is_not_looked_for_on_the_hub(tmp_path):
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "gone.safetensors")
    for file in (tmp_path / "gone.safetensors", tmp_path / "link.safetensors"):
        with pytest.raises(ModelError, match=f"the file '{file}' can't be read: it does not exist"):
            check_sdxl(file)


def test_a_missing_text_encoder_is_said_to_be_missing(changed):
    with pytest.raises(ModelError, match="the second text encoder of .* can't be loaded: the file holds none"):
        load_encoders(str(changed(drop=["conditioner.embedders.1."])))
