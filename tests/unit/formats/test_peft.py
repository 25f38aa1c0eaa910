"""What users load (invariant 5): LoRAs in the stock pipeline, whole UNets, and weights gathered from several devices."""

import copy
import json

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load, load_file
from support.tuned import output, unet_inputs, with_lora

from sdxl_ambient.errors import CheckpointError
from sdxl_ambient.formats import peft
from sdxl_ambient.formats.peft import load_lora_state, lora_state, save_lora, save_unet
from sdxl_ambient.formats.record import read_training_info
from sdxl_ambient.models.lora import add_lora, add_text_lora

INFO = {"t_n": 500, "low_noise": "skip"}


@pytest.fixture(scope="module")
def inputs(unet):
    return unet_inputs(unet)


def test_saving_is_repeatable_and_says_what_it_was_trained_on(unet, tmp_path):
    tuned = with_lora(unet)
    files = [save_lora(tuned, tmp_path / d, INFO) for d in "ab"]
    tensors = [load(f.read_bytes()) for f in files]
    assert all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0] | tensors[1])
    with safe_open(files[0], "pt") as file, safe_open(files[1], "pt") as other:
        assert file.metadata() == other.metadata()
        assert json.loads(file.metadata()["sdxl_ambient"]) == INFO
    assert read_training_info(tmp_path / "a") == INFO
    (tmp_path / "a" / "training.json").unlink()
    assert read_training_info(tmp_path / "a") == INFO == read_training_info(files[0])
    assert read_training_info(tmp_path) == {}
    files[1].write_bytes(files[1].read_bytes()[:50])
    with pytest.raises(CheckpointError, match="can't be read"):
        read_training_info(files[1])


def test_a_large_lora_survives_being_saved(unet, tmp_path):
    """The metadata is added to a file that is written already; its tensors must not be lost on the way."""
    tuned = with_lora(unet, rank=256, targets=["all"])
    path = save_lora(tuned, tmp_path, INFO)
    assert path.stat().st_size > 5e6
    want = lora_state(tuned)
    with safe_open(path, "pt") as file:
        assert {k.removeprefix("unet.") for k in file.keys()} == set(want)
        assert all(torch.equal(file.get_tensor(f"unet.{k}"), v) for k, v in want.items())


def test_a_lora_goes_back_into_the_adapter_that_is_there(unet, tmp_path, inputs):
    tuned, fresh = with_lora(unet, seed=0), with_lora(unet, seed=1)
    path = save_lora(tuned, tmp_path, INFO)
    load_lora_state(fresh, path)
    assert torch.equal(output(fresh, inputs), output(tuned, inputs))
    assert list(fresh.peft_config) == ["default"]
    assert all(p.requires_grad == ("lora" in n) for n, p in fresh.named_parameters())


@pytest.mark.parametrize("other", [dict(rank=8), dict(targets=["linear"]), dict(targets=["to_q"]), dict(use_dora=True)])
def test_another_lora_is_refused(unet, tmp_path, inputs, other):
    path = save_lora(with_lora(unet), tmp_path, INFO)
    target = with_lora(unet, **other)
    before = output(target, inputs)
    with pytest.raises(CheckpointError, match="another LoRA|another shape") as error:
        load_lora_state(target, path)
    assert "\n" not in str(error.value)
    assert torch.equal(output(target, inputs), before)


def test_a_damaged_or_missing_lora_is_refused(unet, tmp_path):
    path = save_lora(with_lora(unet), tmp_path, INFO)
    path.write_bytes(path.read_bytes()[:-10])
    for file in (path, tmp_path / "nothing.safetensors"):
        with pytest.raises(CheckpointError, match="can't be read"):
            load_lora_state(with_lora(unet), file)


def test_a_saved_unet_loads_and_is_equal(unet, tmp_path, inputs):
    tuned = copy.deepcopy(unet)
    for p in tuned.parameters():
        p.data += 0.01
    for _ in range(2):  # saving again replaces
        folder = save_unet(tuned, tmp_path, INFO)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["training.json", "unet"]
    loaded = UNet2DConditionModel.from_pretrained(folder)
    assert torch.equal(output(loaded, inputs), output(tuned, inputs))
    assert read_training_info(tmp_path) == read_training_info(folder) == INFO


def gathered(model, add=0.5):
    """As ``accelerator.get_state_dict`` gives them; other values than the module's own, which would be a piece."""
    return {name: tensor.clone() + add for name, tensor in model.state_dict().items()}


def test_a_gathered_state_is_saved_in_place_of_the_modules_own(unet, encoders, tmp_path):
    models = [with_lora(unet), *copy.deepcopy(encoders.text_encoders)]
    add_text_lora(models[1:], rank=2, alpha=4)
    whole = [gathered(m, i + 1) for i, m in enumerate(models)]
    path = save_lora(models[0], tmp_path, INFO, models[1:], state=whole[0], text_states=whole[1:])
    for i, m in enumerate(models):
        assert all(torch.equal(w, lora_state(m)[n] + (i + 1)) for n, w in lora_state(m, whole[i]).items())
    for m in models:
        m.load_state_dict({n: torch.zeros_like(t) for n, t in m.state_dict().items()})
    load_lora_state(models[0], path, models[1:])
    for m, state in zip(models, whole, strict=True):
        assert all(torch.equal(p, state[n]) for n, p in m.named_parameters() if p.requires_grad)


def test_of_a_lora_that_changed_its_base_too(unet, miniature, tmp_path, inputs):
    tuned = copy.deepcopy(unet)
    add_lora(tuned, rank=4, alpha=6, targets=["attention"], init="pissa")
    whole = {name: tensor + 0.1 if "lora_" in name else tensor for name, tensor in tuned.state_dict().items()}
    save_lora(tuned, tmp_path, INFO, state=whole)
    tuned.load_state_dict(whole)
    pipe = StableDiffusionXLPipeline.from_pretrained(miniature, add_watermarker=False)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(output(pipe.unet, inputs), output(tuned, inputs), rtol=1e-5, atol=1e-5)


def test_a_gathered_unet_is_saved_whole(unet, tmp_path, monkeypatch):
    whole = gathered(unet)
    save = peft.save_torch_state_dict
    # In several files, as SDXL's is.
    monkeypatch.setattr(peft, "save_torch_state_dict", lambda *a, **k: save(*a, **{**k, "max_shard_size": "1MB"}))
    sharded = copy.deepcopy(unet)
    sharded.__class__ = type("FSDPUNet2DConditionModel", (type(unet),), {})  # as torch's fully_shard does
    folder = save_unet(sharded, tmp_path, INFO, state=whole)
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded = UNet2DConditionModel.from_pretrained(folder)
    assert all(torch.equal(t, whole[n]) for n, t in loaded.state_dict().items())


def test_a_saved_unet_is_what_diffusers_saves(unet, tmp_path):
    unet.save_pretrained(tmp_path / "theirs")
    folder = save_unet(unet, tmp_path, INFO)
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in (tmp_path / "theirs").iterdir())
    for path in folder.iterdir():
        theirs = tmp_path / "theirs" / path.name
        if path.suffix == ".json":
            assert json.loads(path.read_text()) == json.loads(theirs.read_text())
            continue
        ours, want = load_file(path), load_file(theirs)
        assert ours.keys() == want.keys() and all(torch.equal(ours[n], want[n]) for n in want)
