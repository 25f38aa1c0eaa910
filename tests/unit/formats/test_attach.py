"""Training goes on from a LoRA of any format."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from support.lora_files import (
    INFO,
    LORA,
    PARTS,
    adapted,
    all_outputs,
    as_kohya,
    assert_same,
    output,
    write,
)

from sdxl_ambient.errors import InterchangeError
from sdxl_ambient.formats.attach import attach, start_from
from sdxl_ambient.formats.peft import load_lora_state, lora_state, save_lora
from sdxl_ambient.formats.read import from_kohya, read_adapter
from sdxl_ambient.models.load import load_unet
from sdxl_ambient.models.lora import add_text_lora
from sdxl_ambient.pipeline import load_pipeline
from sdxl_ambient.provenance import hash_file


def test_training_goes_on_from_a_kohya_lora(unet, tuned, loras, config, tmp_path):
    """Trainable, saved as any of ours, and resumed into another that was begun from the same file."""
    file = write(tmp_path / "style.safetensors", *as_kohya(loras / "patterns", config=config, dtype=torch.float16))
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
        file = write(tmp_path / "style.safetensors", *as_kohya(file, config=config))
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
    file = write(tmp_path / "all.safetensors", *as_kohya(folder / LORA, config=config)) if kind == "kohya" else folder / LORA
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
    for path, message in [
        *cases,
        (tmp_path / "nothing", ".*nothing' does not exist"),
        (tmp_path, "holds 2 .safetensors files; give one of them"),
    ]:
        fresh = copy.deepcopy(unet)
        with pytest.raises(InterchangeError, match=f"--lora: .*{message}") as error:
            start_from(fresh, path)
        assert "\n" not in str(error.value) and not hasattr(fresh, "peft_config")
