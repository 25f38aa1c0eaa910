"""A weight change of any kind becomes a plain LoRA: the best one of its rank, with the error that is printed."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from support.lora_files import INFO, LORA, adapted, output
from support.v_base import make_v_base

from sdxl_ambient.export import main as export
from sdxl_ambient.formats.adapter import Weights
from sdxl_ambient.formats.bake import change_of, low_rank
from sdxl_ambient.formats.lora_export import notes
from sdxl_ambient.formats.peft import save_lora, save_unet
from sdxl_ambient.formats.read import read_adapter
from sdxl_ambient.models.lora import lora_targets
from sdxl_ambient.pipeline import load_pipeline, sample


def run(*arguments):
    return export([str(a) for a in arguments])


@pytest.fixture(scope="module")
def base(miniature):
    return "--pretrained_model_name_or_path", miniature


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (16, 8, 3, 3), (700, 660)])
def test_what_is_lost_is_the_tail_of_the_singular_values(shape):
    """Eckart and Young: no matrix of this rank is nearer. The random search of large ones comes within a thousandth."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(shape[0], 30, generator=generator) * 2.0 ** -torch.arange(30)
    change = (rows @ torch.randn(30, torch.Size(shape[1:]).numel(), generator=generator)).reshape(shape)
    values = torch.linalg.svdvals(change.flatten(1).double())
    for rank in (1, 4, 7):
        weights = low_rank(change, rank)
        lost = (change_of(weights, change) - change).double().norm()
        assert weights.rank == rank and weights.alpha == rank
        torch.testing.assert_close(lost, values[rank:].square().sum().sqrt(), rtol=1e-3, atol=1e-5)


def test_doras_change_is_its_closed_form():
    generator = torch.Generator().manual_seed(1)
    weight, up, down = (torch.randn(*shape, generator=generator) for shape in ((6, 5), (6, 2), (2, 5)))
    magnitude = torch.rand(6, generator=generator) + 0.5
    merged = weight.double() + 3.0 / 2 * up.double() @ down.double()
    wanted = merged * (magnitude.double()[:, None] / merged.norm(dim=1, keepdim=True)) - weight.double()
    torch.testing.assert_close(change_of(Weights(down, up, 3.0, magnitude), weight).double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def dora(unet, tmp_path_factory):
    """A DoRA of every layer and of both text encoders' attention, as trained."""
    folder = tmp_path_factory.mktemp("dora")
    tuned = adapted(unet, r=2, lora_alpha=3.0, target_modules=lora_targets(["all"]), use_dora=True)
    save_lora(tuned, folder, INFO)
    return folder, tuned


@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_of_full_rank_it_draws_what_the_dora_draws(miniature, dora, base, tmp_path, capsys, format):
    folder, tuned = dora
    out = tmp_path / ("style.safetensors" if format == "kohya" else "style")
    assert run("--lora", folder, "--bake", "--bake_rank", 2000, *base, "--format", format, "--output", out) == 0
    assert "off by 0.00% of the change" in capsys.readouterr().out
    assert not read_adapter(out, dict(tuned.config)).uses_dora
    unets = load_pipeline(str(miniature), lora=out).unet, tuned, load_pipeline(str(miniature)).unet
    got, want, plain = map(output, unets)
    assert float((got - want).norm() / (want - plain).norm()) < 1e-3


def test_the_printed_error_is_that_of_the_written_numbers(miniature, dora, base, tmp_path, capsys):
    folder, tuned = dora
    errors = []
    for rank in (4, 16, None):
        out = tmp_path / f"{rank}.safetensors"
        ranked = () if rank is None else ("--bake_rank", rank)
        words = ("--lora", folder, "--bake", *ranked, *base, "--format", "kohya", "--output", out)
        assert run(*words, "--dtype", "float16") == 0
        said = capsys.readouterr().out
        printed = float(re.search(r"off by ([\d.]+)% of the change", said)[1])
        trained, baked = read_adapter(folder, dict(tuned.config)), read_adapter(out, dict(tuned.config))
        lost = whole = 0.0
        unet = load_pipeline(str(miniature)).unet
        for name, weights in trained.parts["unet"].items():
            own = unet.get_submodule(name).weight.detach()
            change, kept = change_of(weights, own).double(), change_of(baked.parts["unet"][name], own).double()
            lost, whole = lost + (kept - change).square().sum(), whole + change.square().sum()
        assert printed == pytest.approx(100 * float((lost / whole).sqrt()), abs=0.006)
        errors.append(printed)
        assert f"baked into rank {rank or 32}: " in said
    assert len({w.alpha for w in baked.parts["unet"].values()}) == 1  # the only kind that diffusers reads rightly
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == 3
    info = read_adapter(out, dict(tuned.config)).info
    assert info["t_n"] == INFO["t_n"] and info["baked_from"] == "dora" and info["baked_rank"] == 32


@pytest.fixture(scope="module")
def full(unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    model, generator = copy.deepcopy(unet), torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.data += 0.01 * torch.randn(p.shape, generator=generator) * (p.ndim > 1 or p.numel() == 4)
    save_unet(model, folder, {**INFO, "finetune": "full"})
    return folder, model


def test_a_full_fine_tune_becomes_a_lora_that_can_be_switched_off(miniature, full, base, tmp_path, capsys):
    """Then diffusers, ComfyUI and their like can hand over to the base at t_n, as the hybrid sampler does."""
    folder, model = full
    words = ("--unet", folder, "--bake", "--bake_rank", 2000, *base, "--format", "peft")
    assert run(*words, "--output", tmp_path / "lora") == 0
    said = capsys.readouterr().out
    assert "off by 0.00% of the change" in said
    assert "note: 1 changed biases and norms (conv_out.bias, …) are left out" in said
    share = float(re.search(r"left out: ([\d.]+)% of the change", said)[1])
    before = load_pipeline(str(miniature)).unet
    changes = {n: float((p - before.get_parameter(n)).double().square().sum()) for n, p in model.named_parameters()}
    assert share == pytest.approx(100 * (changes["conv_out.bias"] / sum(changes.values())) ** 0.5, abs=0.006)
    info = json.loads((tmp_path / "lora/training.json").read_text())
    assert (info["finetune"], info["baked_from"], info["t_n"]) == ("lora", "full", INFO["t_n"])

    def draw(pipe, **more):
        more |= dict(generators=[torch.Generator().manual_seed(0)], num_inference_steps=4, output_type="latent")
        return sample(pipe, ["a star"], sampler="hybrid", t_n=437, **more)

    baked = load_pipeline(str(miniature), lora=tmp_path / "lora")
    with torch.no_grad():
        baked.unet.conv_out.bias.copy_(model.conv_out.bias)
    tuned = load_pipeline(str(miniature), unet=folder)
    # Below t_n both are the base, but for the bias that no LoRA holds.
    other = copy.deepcopy(before)
    with torch.no_grad():
        other.conv_out.bias.copy_(model.conv_out.bias)
    torch.testing.assert_close(draw(baked), draw(tuned, base_unet=other), rtol=1e-3, atol=1e-3)


def test_a_dora_in_kohyas_format_needs_its_flag(dora, base, tmp_path, capsys):
    words = ("--lora", dora[0], *base, "--format", "kohya", "--output", tmp_path / "style.safetensors")
    assert run(*words) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    readers = ("A1111", "InvokeAI", "ComfyUI", "diffusers", "kohya's scripts", "LyCORIS")
    for part in (*readers, "--bake", "--format peft", "--allow_dora"):
        assert part in line
    assert list(tmp_path.iterdir()) == []
    assert run(*words, "--allow_dora") == 0
    assert "note: of DoRA in this format, A1111 and InvokeAI divide" in capsys.readouterr().out
    assert any(name.endswith("dora_scale") for name in load_file(tmp_path / "style.safetensors"))
    assert run("--lora", dora[0], *base, "--format", "peft", "--output", tmp_path / "peft") == 0
    assert (tmp_path / "peft" / LORA).is_file()


def test_the_module_that_a1111_leaves_out_is_named(dora):
    adapter = read_adapter(dora[0], dict(dora[1].config))
    for modules in adapter.parts.values():
        for weights in modules.values():
            weights.magnitude = None
    lost = "lora_unet_up_blocks_0_upsamplers_0_conv"
    assert [n for n in notes(adapter, "diffusers") if f"A1111 leaves out {lost}" in n and "--layout sgm" in n]
    assert notes(adapter, "sgm") == []
    adapter.parts["unet"].pop("up_blocks.0.upsamplers.0.conv")
    assert notes(adapter, "diffusers") == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--bake_rank", 4), "--bake_rank: goes with --bake"),
        (("--bake", "--allow_dora"), "--allow_dora: can not be combined with --bake"),
        (("--bake", "--format", "pipeline"), "--bake: makes a LoRA, not 'pipeline'; give --format kohya or peft"),
        (("--bake",), "--pretrained_model_name_or_path: a value is required, the base that was changed"),
    ],
)
def test_impossible_combinations_are_refused(dora, tmp_path, capsys, words, message):
    words = ("--format", "kohya", *words)
    with pytest.raises(SystemExit):
        run("--lora", dora[0], "--output", tmp_path / "style.safetensors", *words)
    assert message in capsys.readouterr().err


def test_a_lora_is_baked_on_the_kind_of_base_that_it_was_trained_on(miniature, unet, tmp_path, capsys):
    base = make_v_base(tmp_path / "v", miniature)
    tuned = adapted(unet, r=2, use_dora=True)
    save_lora(tuned, tmp_path / "dora", {**INFO, "prediction_type": "epsilon"})
    words = ("--lora", tmp_path / "dora", "--bake", "--pretrained_model_name_or_path", base, "--format", "kohya")
    assert run(*words, "--output", tmp_path / "x.safetensors") == 2
    assert "predicts v_prediction, and the LoRA was trained to predict epsilon" in capsys.readouterr().err
