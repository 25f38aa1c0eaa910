"""python -m sdxl_ambient.verify: every bit of what the toolkit wrote."""

import shutil

import numpy as np
import pytest
from PIL import Image
from support.running import arguments, train_here

from eval.drawing import generate_images, plan
from eval.embedding import FeatureCache
from sdxl_ambient.provenance import write_json, write_sealed
from sdxl_ambient.verify import main


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A training run with its store and checkpoint, drawn images, a cache and scores."""
    from support.pictures import copy_emoji

    folder = tmp_path_factory.mktemp("made")
    assert (
        train_here(arguments(copy_emoji(folder / "emoji", 6), folder / "run", max_train_steps=1, checkpointing_steps=1)) == 0
    )
    pictures = [Image.fromarray(np.full((8, 8, 3), k, np.uint8)) for k in (1, 2)]
    generate_images(folder / "out/drawn", {"a": 1}, plan(["x", "y"], 0), lambda prompts, generators: pictures, 2)
    FeatureCache(folder / "out/embeddings").add(["00" * 32], np.ones((1, 4), np.float32))
    write_sealed(folder / "out/attack.json", {"settings": {}})
    write_json(folder / "out/note.json", {"mine": 1})
    return folder


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made, tmp_path / "made")


def test_what_is_whole_is_counted_and_what_has_no_checksum_is_named(made, capsys):
    assert main([str(made / "run/latents")]) == 0
    assert main([str(made / "run/checkpoint-1"), str(made / "run/pytorch_lora_weights.safetensors")]) == 0
    capsys.readouterr()
    assert main([str(made / "run"), str(made / "out")]) == 0
    said = capsys.readouterr().out
    assert "files are as they were written, 0 are damaged or missing" in said
    assert "have no checksum: " in said and "note.json" in said and "drawn" not in said.split("no checksum")[1]


@pytest.mark.parametrize(
    "name",
    [
        "run/latents/latents-00000.safetensors",
        "run/latents/plan.json",
        "run/checkpoint-1/optimizer.safetensors",
        "run/checkpoint-1/checkpoint.json",
        "run/pytorch_lora_weights.safetensors",
        "out/drawn/images/000001.png",
        "out/drawn/manifest.json",
        "out/attack.json",
    ],
)
def test_one_flipped_bit_is_found_in_any_of_them(copied, capsys, name):
    path = copied / name
    data = bytearray(path.read_bytes())
    place = len(data) - 8 if path.suffix != ".json" else data.index(b'"checksum"') + 20
    data[place] ^= 1
    path.write_bytes(data)
    assert main([str(copied / "run"), str(copied / "out")]) == 2
    damaged = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DAMAGED")]
    assert len(damaged) == 1 and (path.name in damaged[0] or path.parent.name in damaged[0])


def test_a_cache_is_checked(copied, capsys):
    (path,) = (copied / "out/embeddings").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main([str(copied / "out")]) == 2 and str(path) in capsys.readouterr().out


def test_what_is_not_there_or_has_nothing_to_check_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path / "gone")]) == 2 and "is not there" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("")
    assert main([str(tmp_path)]) == 2 and "nothing in it has a checksum" in capsys.readouterr().err
