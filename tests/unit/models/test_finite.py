"""Weights are looked at where networks are read: every one there, of its shape, and finite."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_ambient.errors import InterchangeError, ModelError
from sdxl_ambient.models.finite import check_finite, is_finite
from sdxl_ambient.models.load import load_encoders, load_unet, load_unet_file
from sdxl_ambient.models.vae import load_vae
from sdxl_ambient.pipeline import load_pipeline

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 500, 1000])
def test_one_number_among_many_is_found(dtype, value, place):
    tensor = torch.randn(7, 143).to(dtype)
    assert is_finite(tensor) and is_finite(tensor.T)
    bad = tensor.float()
    bad.view(-1)[place] = value
    bad = bad.to(dtype)
    assert is_finite(bad) == bool(torch.isfinite(bad.float()).all())  # float8_e4m3fn has no infinity
    if value != value:
        assert not is_finite(bad)


def test_what_has_no_such_numbers_passes():
    for tensor in (
        torch.zeros(0),
        torch.arange(3),
        torch.tensor([True]),
        torch.tensor(1.0),
        torch.ones(2, dtype=torch.cfloat),
    ):
        assert is_finite(tensor)
    assert not is_finite(torch.tensor([1, complex(0, float("nan"))]))
    assert is_finite(torch.full((4,), torch.finfo(torch.float32).max))


def test_the_message_names_the_tensor():
    with pytest.raises(InterchangeError, match="^here: b.weight holds NaN or infinity in float32"):
        check_finite({"a": torch.ones(1), "b.weight": torch.tensor([1.0, float("nan")])}, "here", InterchangeError)
    with pytest.raises(ModelError, match="^here: a is missing$"):
        check_finite({"a": torch.ones(1, device="meta")}, "here")


def test_a_pass_is_fast():
    """SDXL's UNet has 2.6 billion numbers; an answer for each, as isfinite writes, takes ten times as long."""
    tensor = torch.zeros(1 << 24)
    check_finite({"warm": tensor}, "")
    start = time.perf_counter()
    check_finite({str(i): tensor for i in range(8)}, "")
    assert time.perf_counter() - start < 2  # 0.5 GB


def damaged(miniature, folder, part, change):
    target = shutil.copytree(miniature, folder / "base")
    state = load_file(target / FILES[part])
    change(state)
    save_file(state, target / FILES[part], metadata={"format": "pt"})
    return target


def a_weight(state):
    return sorted(name for name in state if name.endswith("weight") and state[name].ndim > 1)[3]


def nan(state):
    state[a_weight(state)].view(-1)[-1] = float("nan")


def missing(state):
    del state[a_weight(state)]


def extra(state):
    state["down_blocks.9.weight"] = torch.ones(3)


def another_shape(state):
    state[a_weight(state)] = torch.ones(3, 5)


LOADERS = {
    "unet": load_unet,
    "vae": load_vae,
    "text_encoder": lambda base: load_encoders(str(base)),
    "text_encoder_2": lambda base: load_encoders(str(base)),
}


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("change", [nan, missing, another_shape])
def test_every_part_of_a_base_is_looked_at_alone_and_in_a_pipeline(miniature, tmp_path, part, change):
    base = damaged(miniature, tmp_path, part, change)
    for load in (LOADERS[part], lambda folder: load_pipeline(str(folder))):
        with pytest.raises(ModelError) as error:
            load(base)
        text = str(error.value)
        assert "\n" not in text and str(base) in text
        if change is nan:
            assert a_weight(load_file(base / FILES[part])) in text and "NaN" in text
        if change is missing:
            assert a_weight(load_file(miniature / FILES[part])) in text and "is missing" in text


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_weight_more_is_refused_where_all_are_used(miniature, tmp_path, part):
    base = damaged(miniature, tmp_path, part, extra)
    with pytest.raises(ModelError, match=r"down_blocks\.9\.weight is unknown"):
        load_pipeline(str(base))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nan, "holds NaN or infinity in float32"),
        (missing, "1 weights differ, .*weight is missing"),
        (extra, "1 weights differ, down_blocks.9.weight is unknown"),
        (another_shape, "1 weights differ, .*weight is of another shape"),
    ],
)
def test_so_is_a_unet_of_one_file(miniature, tmp_path, change, message):
    state = load_file(miniature / FILES["unet"])
    change(state)
    file = tmp_path / "unet.safetensors"
    save_file(state, file)
    with pytest.raises(ModelError, match=message):
        load_unet_file(file, miniature)


def test_what_half_precision_can_not_hold_is_refused(miniature, tmp_path):
    def large(state):
        name = a_weight(state)
        state[name] = state[name].float()
        state[name].view(-1)[0] = 1e6

    base = damaged(miniature, tmp_path, "unet", large)
    assert load_unet(base).dtype == torch.float32
    with pytest.raises(ModelError, match="holds NaN or infinity in float16"):
        load_unet(base, dtype=torch.float16)


def test_a_variant_is_taken_where_there_is_one(miniature, tmp_path):
    base = shutil.copytree(miniature, tmp_path / "base")
    (base / FILES["unet"]).rename(base / FILES["unet"].replace(".safetensors", ".fp16.safetensors"))
    assert load_pipeline(str(base), variant="fp16").unet.dtype == torch.float32
    with pytest.raises(ModelError, match="holds no files of the variant 'ema'"):
        load_pipeline(str(base), variant="ema")
    assert load_pipeline(str(base)).unet.dtype == torch.float32  # of the UNet there is no other
    (base / FILES["unet"].replace(".safetensors", ".fp16.safetensors")).unlink()
    with pytest.raises(ModelError, match="the UNet of .* can't be loaded"):
        load_pipeline(str(base))


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "{", "[]", '{"a": NaN, "a": ' + "9" * 5000 + "}", json.dumps({"in_channels": []})]
)
@pytest.mark.parametrize(
    "file", ["model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
)
def test_a_damaged_configuration_is_one_line(miniature, tmp_path, file, content):
    base = shutil.copytree(miniature, tmp_path / "base")
    (base / file).write_text(content)
    try:
        load_pipeline(str(base))
    except ModelError as error:
        assert "\n" not in str(error)
