"""What can't be read whole is refused, in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.lora_files import (
    LORA,
    as_kohya,
    metadata_of,
    write,
)

from sdxl_ambient.errors import InterchangeError
from sdxl_ambient.formats.read import from_kohya, read_adapter


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
    state, _ = as_kohya(loras / "plain", config=config)
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
        as_kohya(with_metadata(loras, tmp_path, **changes), config=config)


def test_a_lora_of_another_size_asks_for_its_base_model(loras):
    with pytest.raises(InterchangeError, match="SDXL .of another size. then give --pretrained_model_name_or_path"):
        as_kohya(loras / "plain")


def test_without_alpha_or_configuration_the_factor_is_one(loras, config, tmp_path):
    state, _ = as_kohya(loras / "patterns", config=config)
    file = write(tmp_path / "a.safetensors", {k: v for k, v in state.items() if not k.endswith(".alpha")})
    bare = write(tmp_path / "b.safetensors", load_file(loras / "patterns" / LORA))
    for adapter in (from_kohya(file, config), read_adapter(bare, config)):
        assert all(w.alpha == w.rank for w in adapter.parts["unet"].values()) and adapter.info == {}
