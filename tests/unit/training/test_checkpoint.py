"""Training states that are whole or not taken for one, and what they say of their weights."""

import json

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from support.tuned import output, unet_inputs, with_lora

from sdxl_ambient.errors import CheckpointError
from sdxl_ambient.formats.peft import load_lora_state, save_lora
from sdxl_ambient.formats.record import lora_metadata, read_training_info
from sdxl_ambient.training import checkpoint
from sdxl_ambient.training.state import load_state

INFO = {"t_n": 500, "low_noise": "skip"}


@pytest.fixture(scope="module")
def inputs(unet):
    return unet_inputs(unet)


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def save(accelerator, folder, step, limit=None):
    return checkpoint.save_checkpoint(accelerator, folder, step, {"micro_step": 2 * step}, limit)


@pytest.fixture
def training(accelerator):
    model = torch.nn.Linear(3, 3)
    return accelerator.prepare(model, torch.optim.AdamW(model.parameters()))


def test_rotation_keeps_the_newest(accelerator, training, tmp_path):
    for step in (5, 10, 15, 100):
        path = save(accelerator, tmp_path, step, limit=2)
        assert path == tmp_path / f"checkpoint-{step}" and path.is_dir()
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-15", "checkpoint-100"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-15"]
    state = checkpoint.check_checkpoint(tmp_path / "checkpoint-100")
    assert state["step"] == 100 and state["progress"] == {"micro_step": 200}


def test_without_a_limit_all_are_kept(accelerator, training, tmp_path):
    for step in (1, 2, 3):
        save(accelerator, tmp_path, step)
    assert len(checkpoint.checkpoints(tmp_path)) == 3
    assert checkpoint.find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-3"


def test_saving_a_step_again_replaces_it(accelerator, training, tmp_path):
    save(accelerator, tmp_path, 1)
    checkpoint.save_checkpoint(accelerator, tmp_path, 1, {"micro_step": 9})
    assert checkpoint.check_checkpoint(tmp_path / "checkpoint-1")["progress"] == {"micro_step": 9}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_temporary_and_other_folders_are_no_checkpoints(tmp_path):
    for name in (".checkpoint-7.tmp", ".checkpoint-7.old", "checkpoint-x", "checkpoint-", "checkpoint-7.tmp", "logs"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-8").write_text("a file")
    assert checkpoint.checkpoints(tmp_path) == []
    assert checkpoint.find_checkpoint(tmp_path, "latest") is None
    assert checkpoint.find_checkpoint(tmp_path / "nowhere", "latest") is None


def damage(folder, how):
    weights = folder / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "one bit":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif how == "missing":
        weights.unlink()
    elif how == "no list":
        (folder / "checkpoint.json").unlink()
    else:
        (folder / "checkpoint.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "bytes, .* were written"),
        ("one bit", "is not as it was written"),
        ("missing", "is missing"),
        ("no list", "not a complete"),
        ("list", "JSON"),
    ],
)
def test_latest_passes_over_damaged_ones_with_a_warning(accelerator, training, tmp_path, how, message):
    for step in (1, 2, 10):
        save(accelerator, tmp_path, step)
    damage(tmp_path / "checkpoint-10", how)
    said = []
    assert checkpoint.find_checkpoint(tmp_path, "latest", said.append) == tmp_path / "checkpoint-2"
    assert len(said) == 1 and "passed over" in said[0] and "checkpoint-10" in said[0]
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.find_checkpoint(tmp_path, "checkpoint-10")
    assert "\n" not in str(error.value)
    for step in (1, 2):
        damage(tmp_path / f"checkpoint-{step}", how)
    with pytest.raises(CheckpointError, match="no whole checkpoint in"):
        checkpoint.find_checkpoint(tmp_path, "latest", said.append)


def test_checkpoints_are_found_by_name_and_by_path(accelerator, training, tmp_path):
    path = save(accelerator, tmp_path, 3)
    assert checkpoint.find_checkpoint(tmp_path, "checkpoint-3") == path == checkpoint.find_checkpoint("/", str(path))
    with pytest.raises(CheckpointError, match="checkpoint-4 is not a complete checkpoint"):
        checkpoint.find_checkpoint(tmp_path, "checkpoint-4")


def test_a_failed_save_removes_nothing_older(accelerator, training, tmp_path, monkeypatch):
    save(accelerator, tmp_path, 1, limit=1)

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_sealed", full)
    with pytest.raises(OSError):
        save(accelerator, tmp_path, 2, limit=1)
    assert checkpoint.find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-1"
    monkeypatch.undo()
    assert save(accelerator, tmp_path, 2, limit=1).name == "checkpoint-2"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


def test_lora_hooks_store_the_lora_alone_and_read_it_back(accelerator, unet, tmp_path, inputs):
    tuned = with_lora(unet)
    prepared = accelerator.prepare(tuned)
    checkpoint.register_lora_hooks(accelerator, accelerator.unwrap_model(prepared))
    path = save(accelerator, tmp_path, 1)
    names = {file.name for file in path.glob("*.safetensors")}
    assert names == {"pytorch_lora_weights.safetensors", "random_state_0.safetensors"}
    want = output(tuned, inputs)
    for p in tuned.parameters():
        if p.requires_grad:
            p.data.add_(1)
    load_state(accelerator, path)
    assert torch.equal(output(tuned, inputs), want)


def test_a_training_state_says_what_the_final_weights_say(accelerator, unet, miniature, tmp_path, inputs):
    """alpha ≠ rank, which a loader can't tell from the weights; t_n, from the folder and from the file alone."""
    tuned = with_lora(unet, rank=4, alpha=16)
    checkpoint.register_lora_hooks(accelerator, accelerator.unwrap_model(accelerator.prepare(tuned)))
    path = checkpoint.save_checkpoint(accelerator, tmp_path, 7, {}, info={**INFO, "step": 7})
    assert checkpoint.check_checkpoint(path)["step"] == 7
    pipe = StableDiffusionXLPipeline.from_pretrained(miniature, add_watermarker=False)
    pipe.load_lora_weights(path)
    torch.testing.assert_close(output(pipe.unet, inputs), output(tuned, inputs), rtol=1e-5, atol=1e-5)
    final = save_lora(tuned, tmp_path / "final", {**INFO, "step": 7})
    with safe_open(path / final.name, "pt") as state, safe_open(final, "pt") as whole:
        assert state.metadata() == whole.metadata()
    for place in (path, path / final.name):
        assert read_training_info(place) == {**INFO, "step": 7}
    (path / "training.json").unlink()
    assert read_training_info(path) == {**INFO, "step": 7}


def test_a_full_fine_tunes_state_says_it_too(accelerator, training, tmp_path):
    path = checkpoint.save_checkpoint(accelerator, tmp_path, 3, {}, info={**INFO, "step": 3})
    for place in (path, path / "model.safetensors"):
        assert read_training_info(place) == {**INFO, "step": 3}
    assert "training.json" in checkpoint.check_checkpoint(path)["files"]


def old_state(accelerator, unet, folder, step, **options):
    """A training state as the first versions left it: the weights alone. Returns the LoRA and its file."""
    tuned = with_lora(unet, **options)
    checkpoint.register_lora_hooks(accelerator, accelerator.unwrap_model(accelerator.prepare(tuned)))
    path = save(accelerator, folder, step) / "pytorch_lora_weights.safetensors"
    save_file(load(path.read_bytes()), path)
    return tuned, path


def test_a_state_without_its_alpha_resumes_but_has_no_known_strength(accelerator, unet, tmp_path, inputs):
    tuned, path = old_state(accelerator, unet, tmp_path, 1)
    want = output(tuned, inputs)
    fresh = with_lora(unet, seed=1)
    load_lora_state(fresh, path)
    assert torch.equal(output(fresh, inputs), want)
    with pytest.raises(CheckpointError, match="saved without its alpha .* its strength is unknown") as error:
        lora_metadata(path)
    assert "\n" not in str(error.value)
    for options, known in [
        (dict(rank=4, lora_alpha=None), 1),
        (dict(rank=4, lora_alpha=4), 1),
        (dict(rank=4, lora_alpha=16), 0),
    ]:
        (tmp_path / "options.json").write_text(json.dumps({"options": options}))
        if known:
            assert lora_metadata(path) == {}
            continue
        with pytest.raises(CheckpointError, match="strength is unknown"):
            lora_metadata(path)


def test_the_record_of_the_run_holds_for_an_old_state_but_for_the_step(accelerator, unet, tmp_path):
    tuned, path = old_state(accelerator, unet, tmp_path, 5, alpha=4)
    assert read_training_info(path) == read_training_info(path.parent) == {}
    save_lora(tuned, tmp_path, {**INFO, "step": 90})
    assert read_training_info(path) == read_training_info(path.parent) == {**INFO, "step": 5}
    # Another adapter that happens to lie in the folder is not the run's.
    save_file(load_file(path), tmp_path / "other.safetensors")
    assert read_training_info(tmp_path / "other.safetensors") == {}
