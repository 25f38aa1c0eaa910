"""What files of weights say of themselves, and how it is read."""

import json

import pytest
import torch
from safetensors.torch import save_file
from support.lora_files import INFO, LORA, adapted, as_kohya, metadata_of

from sdxl_ambient.errors import CheckpointError
from sdxl_ambient.formats.peft import save_lora, save_unet
from sdxl_ambient.formats.record import model_metadata, read_training_info, step_of


def test_our_own_files_say_what_they_are(loras):
    said = metadata_of(loras / "plain" / LORA)
    assert said["modelspec.sai_model_spec"] == "1.0.0"
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert said["modelspec.implementation"] == "diffusers" and "437" in said["modelspec.title"]
    assert said["modelspec.timestep_range"] == "438,999"
    assert said["sdxl_ambient.t_n"] == "437" and said["sdxl_ambient.data"] == "0123abcd"
    assert said["sdxl_ambient.objective"] == "ambient, skip at t <= t_n" and said["sdxl_ambient.base_model"] == "pipeline"
    assert json.loads(said["lora_adapter_metadata"])["unet.r"] == 4


def test_nothing_of_the_noise_key_is_written(unet, config, tmp_path):
    tuned = adapted(unet, target_modules=["to_q"])
    save_lora(tuned, tmp_path, {**INFO, "noise_key_file": "/secret/place", "key_id": "c0ffee"})
    save_unet(tuned, tmp_path / "full", {**INFO, "noise_key_file": "/secret/place", "key_id": "c0ffee"})
    records = [(tmp_path / d / "training.json").read_text() for d in (".", "full")]
    for said in (metadata_of(tmp_path / LORA), as_kohya(tmp_path, config=config)[1], *records):
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
    said = model_metadata(info, "a", "b")
    assert {k: said.get(f"sdxl_ambient.{k}") for k in wanted} == wanted
    assert not {"modelspec.timestep_range", "modelspec.date", "modelspec.resolution"} & said.keys()
    more = model_metadata({**info, "resolution": 64, "prediction_type": "v_prediction"}, "a", "b")
    assert more["modelspec.resolution"] == "64x64" and more["modelspec.prediction_type"] == "v"
    assert model_metadata({"resolution": [640, 512]}, "a", "b")["modelspec.resolution"] == "640x512"


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / "training.json").write_text(text)
    with pytest.raises(CheckpointError, match="training.json can't be read"):
        read_training_info(tmp_path)
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1)}, file, metadata={"sdxl_ambient": text})
    with pytest.raises(CheckpointError, match="x.safetensors can't be read"):
        read_training_info(file)


def test_steps_are_read_from_names():
    assert step_of("a/checkpoint-12") == 12
    assert [step_of(n) for n in ("checkpoint-", "checkpoint-x", "checkpoint-²", "other-3", "checkpoint")] == [None] * 5
