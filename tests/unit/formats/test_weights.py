"""What users load (invariant 5), and checkpoints that are whole or not taken for one."""

import copy
import json

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

from sdxl_ambient.errors import CheckpointError
from sdxl_ambient.formats import peft as checkpoint_peft
from sdxl_ambient.formats import record as checkpoint_record
from sdxl_ambient.models.denoiser import Conditioning, Denoiser
from sdxl_ambient.models.lora import add_lora, add_text_lora
from sdxl_ambient.training import checkpoint

INFO = {"t_n": 500, "low_noise": "skip"}


@pytest.fixture(scope="module")
def inputs(unet):
    generator = torch.Generator().manual_seed(0)
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    conditioning = Conditioning(
        torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator),
        torch.randn(2, pooled, generator=generator),
        torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2),
    )
    return torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([3, 900]), conditioning


@torch.no_grad()
def output(unet, inputs):
    return Denoiser(unet.eval(), inputs[2])(*inputs[:2])


def with_lora(unet, seed=0, rank=4, alpha=16.0, targets=("attention",), use_dora=False):
    """A copy of the UNet with a LoRA whose every weight is as if trained."""
    tuned = copy.deepcopy(unet)
    add_lora(tuned, rank=rank, alpha=alpha, targets=list(targets), use_dora=use_dora)
    generator = torch.Generator().manual_seed(seed)
    for p in tuned.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return tuned


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
    path = checkpoint_peft.save_lora(tuned, tmp_path, INFO)
    assert path.name == "pytorch_lora_weights.safetensors"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pytorch_lora_weights.safetensors", "training.json"]
    pipe = StableDiffusionXLPipeline.from_pretrained(miniature, add_watermarker=False)
    before = output(pipe.unet, inputs)
    torch.testing.assert_close(before, output(unet, inputs), rtol=0, atol=1e-6)
    pipe.load_lora_weights(tmp_path)
    want = output(tuned, inputs)
    torch.testing.assert_close(output(pipe.unet, inputs), want, rtol=1e-5, atol=1e-5)
    assert (want - before).abs().max() > 1e-2


def test_saving_is_repeatable_and_says_what_it_was_trained_on(unet, tmp_path):
    tuned = with_lora(unet)
    files = [checkpoint_peft.save_lora(tuned, tmp_path / d, INFO) for d in "ab"]
    tensors = [load(f.read_bytes()) for f in files]
    assert all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0] | tensors[1])
    with safe_open(files[0], "pt") as file, safe_open(files[1], "pt") as other:
        assert file.metadata() == other.metadata()
        assert json.loads(file.metadata()["sdxl_ambient"]) == INFO
    assert checkpoint_record.read_training_info(tmp_path / "a") == INFO
    (tmp_path / "a" / "training.json").unlink()
    assert checkpoint_record.read_training_info(tmp_path / "a") == INFO == checkpoint_record.read_training_info(files[0])
    assert checkpoint_record.read_training_info(tmp_path) == {}
    files[1].write_bytes(files[1].read_bytes()[:50])
    with pytest.raises(CheckpointError, match="can't be read"):
        checkpoint_record.read_training_info(files[1])


def test_a_large_lora_survives_being_saved(unet, tmp_path):
    """The metadata is added to a file that is written already; its tensors must not be lost on the way."""
    tuned = with_lora(unet, rank=256, targets=["all"])
    path = checkpoint_peft.save_lora(tuned, tmp_path, INFO)
    assert path.stat().st_size > 5e6
    want = checkpoint_peft.lora_state(tuned)
    with safe_open(path, "pt") as file:
        assert {k.removeprefix("unet.") for k in file.keys()} == set(want)
        assert all(torch.equal(file.get_tensor(f"unet.{k}"), v) for k, v in want.items())


def test_a_lora_goes_back_into_the_adapter_that_is_there(unet, tmp_path, inputs):
    tuned, fresh = with_lora(unet, seed=0), with_lora(unet, seed=1)
    path = checkpoint_peft.save_lora(tuned, tmp_path, INFO)
    checkpoint_peft.load_lora_state(fresh, path)
    assert torch.equal(output(fresh, inputs), output(tuned, inputs))
    assert list(fresh.peft_config) == ["default"]
    assert all(p.requires_grad == ("lora" in n) for n, p in fresh.named_parameters())


@pytest.mark.parametrize("other", [dict(rank=8), dict(targets=["linear"]), dict(targets=["to_q"]), dict(use_dora=True)])
def test_another_lora_is_refused(unet, tmp_path, inputs, other):
    path = checkpoint_peft.save_lora(with_lora(unet), tmp_path, INFO)
    target = with_lora(unet, **other)
    before = output(target, inputs)
    with pytest.raises(CheckpointError, match="another LoRA|another shape") as error:
        checkpoint_peft.load_lora_state(target, path)
    assert "\n" not in str(error.value)
    assert torch.equal(output(target, inputs), before)


def test_a_damaged_or_missing_lora_is_refused(unet, tmp_path):
    path = checkpoint_peft.save_lora(with_lora(unet), tmp_path, INFO)
    path.write_bytes(path.read_bytes()[:-10])
    for file in (path, tmp_path / "nothing.safetensors"):
        with pytest.raises(CheckpointError, match="can't be read"):
            checkpoint_peft.load_lora_state(with_lora(unet), file)


def test_a_saved_unet_loads_and_is_equal(unet, tmp_path, inputs):
    tuned = copy.deepcopy(unet)
    for p in tuned.parameters():
        p.data += 0.01
    for _ in range(2):  # saving again replaces
        folder = checkpoint_peft.save_unet(tuned, tmp_path, INFO)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["training.json", "unet"]
    loaded = UNet2DConditionModel.from_pretrained(folder)
    assert torch.equal(output(loaded, inputs), output(tuned, inputs))
    assert checkpoint_record.read_training_info(tmp_path) == checkpoint_record.read_training_info(folder) == INFO


# -- weights that lie in pieces on several devices ---------------------------------------------------------------


def gathered(model, add=0.5):
    """As ``accelerator.get_state_dict`` gives them; other values than the module's own, which would be a piece."""
    return {name: tensor.clone() + add for name, tensor in model.state_dict().items()}


def test_a_gathered_state_is_saved_in_place_of_the_modules_own(unet, encoders, tmp_path):
    models = [with_lora(unet), *copy.deepcopy(encoders.text_encoders)]
    add_text_lora(models[1:], rank=2, alpha=4)
    whole = [gathered(m, i + 1) for i, m in enumerate(models)]
    path = checkpoint_peft.save_lora(models[0], tmp_path, INFO, models[1:], state=whole[0], text_states=whole[1:])
    for i, m in enumerate(models):
        assert all(
            torch.equal(w, checkpoint_peft.lora_state(m)[n] + (i + 1))
            for n, w in checkpoint_peft.lora_state(m, whole[i]).items()
        )
    for m in models:
        m.load_state_dict({n: torch.zeros_like(t) for n, t in m.state_dict().items()})
    checkpoint_peft.load_lora_state(models[0], path, models[1:])
    for m, state in zip(models, whole, strict=True):
        assert all(torch.equal(p, state[n]) for n, p in m.named_parameters() if p.requires_grad)


def test_of_a_lora_that_changed_its_base_too(unet, miniature, tmp_path, inputs):
    tuned = copy.deepcopy(unet)
    add_lora(tuned, rank=4, alpha=6, targets=["attention"], init="pissa")
    whole = {name: tensor + 0.1 if "lora_" in name else tensor for name, tensor in tuned.state_dict().items()}
    checkpoint_peft.save_lora(tuned, tmp_path, INFO, state=whole)
    tuned.load_state_dict(whole)
    pipe = StableDiffusionXLPipeline.from_pretrained(miniature, add_watermarker=False)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(output(pipe.unet, inputs), output(tuned, inputs), rtol=1e-5, atol=1e-5)


def test_a_gathered_unet_is_saved_whole(unet, tmp_path, monkeypatch):
    whole = gathered(unet)
    save = checkpoint_peft.save_torch_state_dict
    # In several files, as SDXL's is.
    monkeypatch.setattr(checkpoint_peft, "save_torch_state_dict", lambda *a, **k: save(*a, **{**k, "max_shard_size": "1MB"}))
    sharded = copy.deepcopy(unet)
    sharded.__class__ = type("FSDPUNet2DConditionModel", (type(unet),), {})  # as torch's fully_shard does
    folder = checkpoint_peft.save_unet(sharded, tmp_path, INFO, state=whole)
    assert json.loads((folder / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded = UNet2DConditionModel.from_pretrained(folder)
    assert all(torch.equal(t, whole[n]) for n, t in loaded.state_dict().items())


def test_a_saved_unet_is_what_diffusers_saves(unet, tmp_path):
    unet.save_pretrained(tmp_path / "theirs")
    folder = checkpoint_peft.save_unet(unet, tmp_path, INFO)
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in (tmp_path / "theirs").iterdir())
    for path in folder.iterdir():
        theirs = tmp_path / "theirs" / path.name
        if path.suffix == ".json":
            assert json.loads(path.read_text()) == json.loads(theirs.read_text())
            continue
        ours, want = load_file(path), load_file(theirs)
        assert ours.keys() == want.keys() and all(torch.equal(ours[n], want[n]) for n in want)


# -- training states ------------------------------------------------------------------------------------------


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
    (weights,) = folder.glob("*.safetensors")
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
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

    monkeypatch.setattr(checkpoint, "write_json", full)
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
    (weights,) = path.glob("*.safetensors")
    assert weights.name == "pytorch_lora_weights.safetensors"
    want = output(tuned, inputs)
    for p in tuned.parameters():
        if p.requires_grad:
            p.data.add_(1)
    accelerator.load_state(str(path))
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
    final = checkpoint_peft.save_lora(tuned, tmp_path / "final", {**INFO, "step": 7})
    with safe_open(path / final.name, "pt") as state, safe_open(final, "pt") as whole:
        assert state.metadata() == whole.metadata()
    for place in (path, path / final.name):
        assert checkpoint_record.read_training_info(place) == {**INFO, "step": 7}
    (path / "training.json").unlink()
    assert checkpoint_record.read_training_info(path) == {**INFO, "step": 7}


def test_a_full_fine_tunes_state_says_it_too(accelerator, training, tmp_path):
    path = checkpoint.save_checkpoint(accelerator, tmp_path, 3, {}, info={**INFO, "step": 3})
    for place in (path, path / "model.safetensors"):
        assert checkpoint_record.read_training_info(place) == {**INFO, "step": 3}
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
    checkpoint_peft.load_lora_state(fresh, path)
    assert torch.equal(output(fresh, inputs), want)
    with pytest.raises(CheckpointError, match="saved without its alpha .* its strength is unknown") as error:
        checkpoint_record.lora_metadata(path)
    assert "\n" not in str(error.value)
    for options, known in [
        (dict(rank=4, lora_alpha=None), 1),
        (dict(rank=4, lora_alpha=4), 1),
        (dict(rank=4, lora_alpha=16), 0),
    ]:
        (tmp_path / "options.json").write_text(json.dumps({"options": options}))
        if known:
            assert checkpoint_record.lora_metadata(path) == {}
            continue
        with pytest.raises(CheckpointError, match="strength is unknown"):
            checkpoint_record.lora_metadata(path)


def test_the_record_of_the_run_holds_for_an_old_state_but_for_the_step(accelerator, unet, tmp_path):
    tuned, path = old_state(accelerator, unet, tmp_path, 5, alpha=4)
    assert checkpoint_record.read_training_info(path) == checkpoint_record.read_training_info(path.parent) == {}
    checkpoint_peft.save_lora(tuned, tmp_path, {**INFO, "step": 90})
    assert (
        checkpoint_record.read_training_info(path)
        == checkpoint_record.read_training_info(path.parent)
        == {**INFO, "step": 5}
    )
    # Another adapter that happens to lie in the folder is not the run's.
    save_file(load_file(path), tmp_path / "other.safetensors")
    assert checkpoint_record.read_training_info(tmp_path / "other.safetensors") == {}


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / "training.json").write_text(text)
    with pytest.raises(CheckpointError, match="training.json can't be read"):
        checkpoint_record.read_training_info(tmp_path)
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1)}, file, metadata={"sdxl_ambient": text})
    with pytest.raises(CheckpointError, match="x.safetensors can't be read"):
        checkpoint_record.read_training_info(file)


def test_steps_are_read_from_names():
    assert checkpoint_record.step_of("a/checkpoint-12") == 12
    assert [
        checkpoint_record.step_of(n) for n in ("checkpoint-", "checkpoint-x", "checkpoint-²", "other-3", "checkpoint")
    ] == [None] * 5
