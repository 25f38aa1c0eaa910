"""Exports through the command: LoRAs both ways, pipelines and single files, and what is refused."""

import copy
import hashlib
import json
import os

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from support.lora_files import (
    INFO,
    LORA,
    assert_same,
    metadata_of,
)

from sdxl_ambient import export
from sdxl_ambient.formats import files, lora_export
from sdxl_ambient.formats.lora_export import notes
from sdxl_ambient.formats.peft import save_unet
from sdxl_ambient.formats.read import read_adapter
from sdxl_ambient.formats.record import read_training_info
from sdxl_ambient.models.load import load_unet
from sdxl_ambient.pipeline import load_pipeline


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
    return export.main([str(a) for a in arguments])


@pytest.mark.parametrize(("kind", "count"), [("plain", 0), ("patterns", 1), ("dora", 2), ("rslora", 0)])
def test_what_other_programs_read_otherwise_is_said(loras, config, kind, count):
    said = notes(read_adapter(loras / kind, config))
    assert len(said) == count
    for reader in ("A1111", "InvokeAI", "ComfyUI divides", "diffusers and kohya's scripts", "LyCORIS"):
        assert (reader in "".join(said)) == (kind == "dora")


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
    monkeypatch.setattr(lora_export, "read_adapter", lambda *a: pytest.fail("loaded"))
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

    monkeypatch.setattr(files, "save_file", full)
    base = ("--lora", loras / "plain", "--pretrained_model_name_or_path", miniature, "--output")
    assert run(*base, out, "--format", "kohya") == run(*base, tmp_path / "d", "--format", "peft") == 2
    assert "No space left" in capsys.readouterr().err and not list(tmp_path.iterdir())
