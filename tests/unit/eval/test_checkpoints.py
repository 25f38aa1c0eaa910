"""Which weights an evaluation takes: of a LoRA, a UNet, a whole run; and what it refuses before loading."""

import copy
import shutil

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load, save_file

from eval.checkpoints import Checkpoint, check_checkpoint, hash_weights, run_checkpoints, weight_files
from sdxl_ambient.errors import OptionError
from sdxl_ambient.formats import peft as checkpoint_peft
from sdxl_ambient.models.lora import add_lora
from sdxl_ambient.pipeline import load_pipeline
from sdxl_ambient.provenance import write_sealed
from sdxl_ambient.training import checkpoint

LORA = "pytorch_lora_weights.safetensors"


def info(step):
    return {"t_n": 500, "step": step}


def state(folder, step, model, record=True):
    """A training state as the script saves it, of a UNet or of a LoRA on one."""
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    if getattr(model, "peft_config", None):
        checkpoint.register_lora_hooks(accelerator, model)
    return checkpoint.save_checkpoint(accelerator, folder, step, {}, info=info(step) if record else None)


@pytest.fixture(scope="module")
def lora(unet):
    """A UNet with a LoRA of alpha ≠ rank."""
    tuned = copy.deepcopy(unet)
    add_lora(tuned, rank=2, alpha=6, targets=["attention"])
    for p in tuned.parameters():
        if p.requires_grad:
            p.data += 0.05
    return tuned


@pytest.fixture(scope="module")
def lora_run(lora, tmp_path_factory):
    """A run of a LoRA: states at 2 and 10, and the final weights of step 10. Not to be changed."""
    folder = tmp_path_factory.mktemp("lora_run")
    for step in (2, 10):
        state(folder, step, lora)
    checkpoint_peft.save_lora(lora, folder, info(10))
    return folder


@pytest.fixture(scope="module")
def full_run(unet, tmp_path_factory):
    """A run of a full fine-tune: a state at 4, and the final weights of step 5. Not to be changed."""
    folder = tmp_path_factory.mktemp("full_run")
    tuned = copy.deepcopy(unet).requires_grad_(True)
    for p in tuned.parameters():
        p.data += 0.01
    state(folder, 4, tuned)
    checkpoint_peft.save_unet(tuned, folder, info(5))
    return folder


@pytest.fixture
def warnings():
    return []


# -- a run ----------------------------------------------------------------------------------------------------------


def test_every_step_of_a_lora_run_in_order(lora_run, warnings):
    found = run_checkpoints("dogs", lora_run, warn=warnings.append)
    assert found == [
        Checkpoint("dogs-2", lora=lora_run / "checkpoint-2" / LORA, run="dogs", step=2),
        Checkpoint("dogs-10", lora=lora_run / LORA, run="dogs", step=10),
    ]
    assert [c.t_n() for c in found] == [500, 500] and not warnings
    assert found == run_checkpoints("dogs", lora_run, "lora")


def test_a_state_draws_as_the_final_weights_do(lora_run, miniature, unet, lora):
    states = [load_pipeline(str(miniature), lora=p) for p in (lora_run, lora_run / "checkpoint-10")]
    states += [load_pipeline(str(miniature), lora=c.lora) for c in run_checkpoints("a", lora_run)]
    want = lora_output(lora)
    for pipe in states:
        torch.testing.assert_close(lora_output(pipe.unet), want, rtol=1e-5, atol=1e-5)
    assert (want - lora_output(unet)).abs().max() > 1e-2


@torch.no_grad()
def lora_output(unet):
    generator = torch.Generator().manual_seed(0)
    noise, prompt = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 77, 80, generator=generator)
    pooled = torch.randn(1, unet.config.projection_class_embeddings_input_dim - 6 * 32, generator=generator)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    return unet.eval()(noise, 300, prompt, added_cond_kwargs=added).sample


def test_every_step_of_a_full_fine_tune(full_run, miniature, warnings):
    found = run_checkpoints("cats", full_run, warn=warnings.append)
    assert [(c.name, c.step, c.lora) for c in found] == [("cats-4", 4, None), ("cats-5", 5, None)]
    assert [c.unet for c in found] == [full_run / "checkpoint-4/model.safetensors", full_run / "unet"]
    assert [c.t_n() for c in found] == [500, 500] and not warnings
    first, last = (load_pipeline(str(miniature), unet=c.unet).unet.state_dict() for c in found)
    assert all(torch.equal(first[k], last[k]) for k in last)
    folder = load_pipeline(str(miniature), unet=full_run / "checkpoint-4").unet.state_dict()
    assert all(torch.equal(folder[k], last[k]) for k in last)


def test_final_weights_of_an_unknown_step_are_left_out(lora_run, tmp_path):
    run = shutil.copytree(lora_run, tmp_path / "run")
    (run / "training.json").unlink()
    save_file(load((run / LORA).read_bytes()), run / LORA)
    assert [c.lora.parent for c in run_checkpoints("a", run)] == [run / "checkpoint-2", run / "checkpoint-10"]


def test_final_weights_alone_are_a_run_of_one_step(lora_run, tmp_path):
    run = shutil.copytree(lora_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    assert run_checkpoints("a", run) == [Checkpoint("a-10", lora=run / LORA, run="a", step=10)]


@pytest.mark.parametrize("layout", ["lora", "unet"])
def test_runs_of_the_diffusers_examples(lora_run, full_run, tmp_path, warnings, layout):
    """Their states hold the LoRA, or the UNet's folder, and record nothing."""
    for step in (500, 1000):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.bin").write_bytes(b"")
        if layout == "lora":
            shutil.copy(lora_run / LORA, folder)
        else:
            shutil.copytree(full_run / "unet", folder / "unet")
    (tmp_path / "checkpoint-1500").mkdir()  # cut short
    found = run_checkpoints("x", tmp_path, warn=warnings.append)
    assert [c.name for c in found] == ["x-500", "x-1000"]
    assert getattr(found[0], layout) == tmp_path / "checkpoint-500" / (LORA if layout == "lora" else "unet")
    (said,) = warnings
    assert "checkpoint-1500" in said and "holds no weights" in said


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("listed", [True, False])
def test_damaged_states_are_left_out_with_a_warning(lora_run, tmp_path, warnings, listed):
    run = shutil.copytree(lora_run, tmp_path / "run")
    cut(run / "checkpoint-2" / LORA)
    if not listed:
        (run / "checkpoint-2/checkpoint.json").unlink()
    assert [c.name for c in run_checkpoints("a", run, warn=warnings.append)] == ["a-10"]
    (said,) = warnings
    assert "left out" in said and "checkpoint-2" in said and "\n" not in said


def test_a_state_stands_in_for_damaged_final_weights(lora_run, tmp_path, warnings):
    run = shutil.copytree(lora_run, tmp_path / "run")
    cut(run / LORA)
    assert [c.lora for c in run_checkpoints("a", run, warn=warnings.append)][1:] == [run / "checkpoint-10" / LORA]
    assert len(warnings) == 1


def test_states_of_unknown_strength_are_left_out(lora, tmp_path, warnings):
    weights = state(tmp_path, 3, lora, record=False) / LORA
    save_file(load(weights.read_bytes()), weights)
    content = {"format_version": checkpoint.FORMAT_VERSION, "step": 3, "progress": {}, "files": {}}
    write_sealed(weights.parent / "checkpoint.json", content)
    with pytest.raises(OptionError, match="--run: .* holds no whole checkpoint-<step>"):
        run_checkpoints("a", tmp_path, warn=warnings.append)
    assert len(warnings) == 1 and "strength is unknown" in warnings[0]
    with pytest.raises(OptionError, match="--lora: .*strength is unknown"):
        check_checkpoint("lora", weights)


def test_a_folder_without_a_run_is_named(lora_run, miniature, tmp_path):
    for folder in (tmp_path, miniature):
        with pytest.raises(OptionError, match=f"--run: '{folder}' holds no whole checkpoint-<step> of a training run"):
            run_checkpoints("a", folder)
    with pytest.raises(OptionError, match="--checkpoints_of: .* is not a folder"):
        run_checkpoints("a", tmp_path / "gone", option_name="checkpoints_of")
    with pytest.raises(OptionError, match="with a UNet"):
        run_checkpoints("a", lora_run, "unet", warn=lambda said: None)


# -- one model --------------------------------------------------------------------------------------------------------


def test_files_and_folders_are_taken(lora_run, full_run):
    for kind, path in [
        ("lora", lora_run),
        ("lora", lora_run / LORA),
        ("lora", lora_run / "checkpoint-2"),
        ("unet", full_run),
        ("unet", full_run / "unet"),
        ("unet", full_run / "checkpoint-4"),
        ("unet", full_run / "checkpoint-4/model.safetensors"),
        ("unet", full_run / "unet/diffusion_pytorch_model.safetensors"),
    ]:
        check_checkpoint(kind, path)
        assert weight_files(path, kind) and len(hash_weights(path, kind)) == 64
    assert weight_files(full_run / "checkpoint-4", "unet") == [full_run / "checkpoint-4/model.safetensors"]
    assert hash_weights(full_run / "checkpoint-4", "unet") == hash_weights(
        full_run / "checkpoint-4/model.safetensors", "unet"
    )


def test_what_can_not_be_evaluated_is_named(lora_run, full_run, tmp_path):
    cut_file = shutil.copy(lora_run / LORA, tmp_path / "cut.safetensors")
    cut(cut_file)
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"")
    two = tmp_path / "two"
    two.mkdir()
    for name in "ab":
        shutil.copy(lora_run / LORA, two / f"{name}.safetensors")
    for kind, path, message in [
        ("lora", tmp_path / "gone", "does not exist"),
        ("lora", two, "holds 2 .safetensors files; give one of them"),
        ("lora", cut_file, "can't be read"),
        ("unet", cut_file, "can't be read"),
        ("unet", pickled, "is not a .safetensors file"),
        ("unet", lora_run / LORA, "is a LoRA; give it with --lora"),
        ("lora", full_run / "checkpoint-4/model.safetensors", "holds no LoRA; --unet takes a UNet"),
        ("unet", tmp_path, "does not hold a UNet's"),
        ("lora", full_run, "does not hold pytorch_lora_weights.safetensors"),
    ]:
        with pytest.raises(OptionError, match=f"^--{kind}: .*{message}") as error:
            check_checkpoint(kind, path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
