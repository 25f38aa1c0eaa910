"""Which files a path stands for."""

import json

import pytest

from sdxl_ambient import formats, models
from sdxl_ambient.errors import InterchangeError
from sdxl_ambient.formats.find import lora_file, part_files, unet_file, unet_files, unet_folder

LORA = "pytorch_lora_weights.safetensors"
UNET = "diffusion_pytorch_model.safetensors"


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def test_a_lora_is_a_file_or_the_one_in_a_folder(tmp_path):
    one, ours = touch(tmp_path / "one", "style.safetensors", "notes.txt"), touch(tmp_path / "ours", LORA, "b.safetensors")
    assert lora_file(one) == lora_file(one / "style.safetensors") == lora_file(str(one)) == one / "style.safetensors"
    assert lora_file(ours) == ours / LORA
    # A folder may be called like a file.
    assert lora_file(touch(tmp_path / "x.safetensors", "y.safetensors")).name == "y.safetensors"


@pytest.mark.parametrize(
    ("names", "path", "message"),
    [
        ([], "gone", "'{path}' does not exist"),
        (["a.pt"], "a.pt", "'{path}' is not a .safetensors file; no other is read"),
        (["a.pt"], ".", "'{path}' does not hold pytorch_lora_weights.safetensors"),
        (["a.safetensors", "b.safetensors"], ".", "'{path}' holds 2 .safetensors files; give one of them"),
    ],
)
def test_a_place_without_one_lora_is_named(tmp_path, names, path, message):
    path = touch(tmp_path, *names) / path
    with pytest.raises(InterchangeError) as error:
        lora_file(path)
    assert str(error.value) == message.format(path=path)


def test_a_unet_is_a_folder_a_run_a_training_state_or_a_file(tmp_path):
    run = touch(tmp_path / "run", "unet/config.json", f"unet/{UNET}", "checkpoint-4/model.safetensors")
    files = [run / "unet/config.json", run / "unet" / UNET]
    assert unet_files(run) == unet_files(run / "unet") == files
    assert unet_folder(run) == unet_folder(run / "unet") == run / "unet" and unet_file(run) is None
    state = run / "checkpoint-4/model.safetensors"
    assert unet_files(state.parent) == unet_files(state) == [state] == [unet_file(state.parent)]
    assert unet_folder(state.parent) is None


@pytest.mark.parametrize("names", [[], ["config.json"], [UNET], ["config.json", "diffusion_pytorch_model.bin"]])
def test_half_a_unet_is_none(tmp_path, names):
    folder = touch(tmp_path, "readme", *names)
    with pytest.raises(InterchangeError, match=f"^'{folder}' does not hold a UNet's .safetensors files$"):
        unet_files(folder)


def test_shards_come_with_their_index_and_a_variant_only_where_it_is_alone(tmp_path):
    shards = ["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"]
    folder = touch(tmp_path, *shards, "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin")
    index = folder / f"{UNET}.index.json"
    index.write_text(json.dumps({"weight_map": {"x": shards[1], "y": shards[0], "z": shards[1]}}))
    assert part_files(folder) == [index, *(folder / shard for shard in shards)]
    index.unlink()
    variant = folder / "diffusion_pytorch_model.fp16.safetensors"
    assert part_files(folder) == [variant]
    variant.unlink()
    with pytest.raises(InterchangeError, match="other files of weights are not read"):
        part_files(folder)


@pytest.mark.parametrize("package", [formats, models])
def test_a_package_offers_what_it_names(package):
    assert sorted(package.__all__) == list(dict.fromkeys(sorted(package.__all__)))
    assert all(
        getattr(package, name).__module__.startswith(package.__name__) for name in package.__all__ if name[0].islower()
    )
