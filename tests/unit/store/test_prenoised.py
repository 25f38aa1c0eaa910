"""Stores of latents that are noisy already: what the files hold, and nothing drawn."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from support.stores import equal, latents_in, snapshot

from sdxl_ambient.config.data import LatentsOptions
from sdxl_ambient.config.parser import build_options
from sdxl_ambient.errors import ImageError, ImagesMissing, OptionError, StoreError
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.store.build import build_store
from sdxl_ambient.store.prenoised import latent_hash, list_latents, load_latent
from sdxl_ambient.store.reader import LatentStore
from sdxl_ambient.store.settings import StoreSettings


def latents(count=5, height=8, width=12):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, height, width, generator=generator) for _ in range(count)]


@pytest.fixture
def noisy(tmp_path):
    """A folder of five noisy latents with captions in .txt files."""
    folder = tmp_path / "noisy"
    folder.mkdir()
    for i, latent in enumerate(latents()):
        save_file({"latent": latent}, folder / f"{i}.safetensors")
        (folder / f"{i}.txt").write_text(f"caption {i}")
    return folder


@pytest.fixture
def store(encoders, schedule, tmp_path):
    """build_store for such a folder, with encoders that have no VAE."""

    def run(folder, output=None, *, log=lambda message: None, **settings):
        settings = StoreSettings(Geometry(1024), pre_noised=True, **{"t_n": 400, **settings})
        return build_store(folder, output or tmp_path / "s", replace(encoders, vae=None), schedule, settings, log=log)

    return run


def test_a_store_holds_what_the_files_hold(noisy, store, tmp_path):
    manifest = store(noisy, shard_size=2, noise_key_file=tmp_path / "key")
    assert equal(latents_in(tmp_path / "s"), {latent_hash(x): x for x in latents()})
    assert not (tmp_path / "key").exists() and manifest["key_id"] is None
    assert manifest["fingerprint"]["latent"].keys() == {"pre_noised", "resolution", "schedule", "t_n"}
    assert manifest["fingerprint"]["latent"]["pre_noised"] is True
    assert all(i["t_n"] == 400 and i["time_ids"] == [64, 96, 0, 0, 64, 96] for i in manifest["images"])
    assert len(list((tmp_path / "s").glob("latents-*"))) == 3
    item = LatentStore(tmp_path / "s")[0, 0]
    assert item["x_n"].shape == (4, 8, 12) and item["t_n"] == 400 and torch.isfinite(item["embeds"]).all()


def test_metadata_tells_captions_levels_sizes_and_crops(noisy, store):
    rows = [
        {"file_name": "0.safetensors", "level": 300, "original_size": [512, 768], "crop_top_left": [3, 5]},
        {"file_name": "1.safetensors", "level": -1, "text": ["one", "two"], "crop_top_left": None},
        {"file_name": "2.safetensors"},
    ]
    (noisy / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    manifest = store(noisy, t_n_column="level")
    by_content = {i["content"]: i for i in manifest["images"]}
    entries = [by_content[latent_hash(x)] for x in latents()]
    assert [e["t_n"] for e in entries] == [300, None, 400, 400, 400]
    assert entries[0]["time_ids"] == [512, 768, 3, 5, 64, 96] and entries[1]["time_ids"] == [64, 96, 0, 0, 64, 96]
    assert [len(e["captions"]) for e in entries] == [1, 2, 1, 1, 1]


def test_a_csv_file_spells_sizes_as_json(noisy):
    (noisy / "metadata.csv").write_text('file_name,text,original_size\n0.safetensors,a,"[10, 20]"\n1.safetensors,b,\n')
    assert [r.original_size for r in list_latents(noisy, 400)] == [(10, 20), None, None, None, None]
    for value in ('"[10, 20, 30]"', "ten", '"[-1, 2]"', '"[1.5, 2]"', "7"):
        (noisy / "metadata.csv").write_text(f"file_name,text,original_size\n0.safetensors,a,{value}\n")
        with pytest.raises(
            ImagesMissing, match=r"metadata.csv, line 2: 'original_size' is .*; allowed are two whole numbers"
        ):
            list_latents(noisy, 400)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"latents": torch.zeros(4, 8, 8)}, "holds latents, not one 'latent'"),
        ({"latent": torch.zeros(4, 8, 8), "more": torch.zeros(1)}, "holds latent, more, not one 'latent'"),
        (
            {"latent": torch.zeros(4, 8, 8, dtype=torch.float64)},
            "torch.float64 values; allowed are float16, bfloat16, float32",
        ),
        ({"latent": torch.zeros(4, 8, 8, dtype=torch.int32)}, "torch.int32 values"),
        ({"latent": torch.zeros(1, 4, 8, 8)}, r"shape \(1, 4, 8, 8\); allowed is \(4, h, w\), h and w multiples of 4"),
        ({"latent": torch.zeros(16, 8, 8)}, r"shape \(16, 8, 8\)"),
        ({"latent": torch.zeros(4, 8, 10)}, r"shape \(4, 8, 10\)"),
        ({"latent": torch.zeros(4, 0, 8)}, r"shape \(4, 0, 8\)"),
        ({"latent": torch.full((4, 8, 8), float("nan"))}, "values that are not finite"),
        ({"latent": torch.full((4, 8, 8), float("inf"))}, "values that are not finite"),
        (None, "unreadable: "),
    ],
)
def test_files_that_are_no_latent_have_a_reason(tmp_path, tensors, reason):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"no tensors") if tensors is None else save_file(tensors, path)
    with pytest.raises(ImageError, match=reason) as error:
        load_latent(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_stored_as_float32(tmp_path, dtype):
    latent = latents(1)[0].to(dtype)
    save_file({"latent": latent}, tmp_path / "a.safetensors")
    loaded = load_latent(tmp_path / "a.safetensors")
    assert loaded.dtype == torch.float32 and torch.equal(loaded, latent.float())


def test_wrong_files_are_skipped_counted_and_printed(noisy, store):
    save_file({"x": torch.zeros(1)}, noisy / "wrong.safetensors")
    (noisy / "wrong.txt").write_text("a caption")
    save_file({"latent": latents(6)[5]}, noisy / "silent.safetensors")
    said = []
    manifest = store(noisy, log=said.append)
    assert manifest["counts"]["files"] == 7 and manifest["counts"]["images"] == 5 and manifest["counts"]["skipped"] == 2
    assert "  wrong.safetensors: holds x, not one 'latent'" in said
    assert [s["file"] for s in manifest["skipped"]] == ["silent.safetensors", "wrong.safetensors"]


def test_a_latent_needs_a_level_and_none_is_clean_by_accident(noisy, store, tmp_path):
    with pytest.raises(ImagesMissing, match="--pre_noised: 0.safetensors has no noise level; allowed are --t_n, or -1 in"):
        store(noisy, t_n=None)
    rows = [{"file_name": f"{i}.safetensors", "level": -1 if i == 3 else 7} for i in range(5)]
    (noisy / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = []
    store(noisy, t_n=None, t_n_column="level", log=said.append)
    assert any("1 of 5 images are told to be clean" in s for s in said)
    with pytest.raises(ImagesMissing, match="--pre_noised: .* holds no .safetensors files"):
        (tmp_path / "empty").mkdir()
        store(tmp_path / "empty")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(near_duplicates="drop"),
            "--near_duplicates: 'drop' excludes --pre_noised, as noise hides them; allowed are rep",
        ),
        (dict(t_n=None), "--t_n: none excludes --pre_noised"),
        (dict(aspect_ratio_buckets="auto"), "--aspect_ratio_buckets: excludes --pre_noised"),
        (dict(train_data_dir=None, dataset_name="a/b"), "--pre_noised: true needs --train_data_dir"),
    ],
)
def test_options_that_mean_nothing_for_them_are_refused(noisy, tmp_path, options, message):
    usual = {"pretrained_model_name_or_path": "base", "train_data_dir": str(noisy), "output_dir": str(tmp_path / "s")}
    with pytest.raises(OptionError, match=message):
        build_options(LatentsOptions, {**usual, "pre_noised": True, **options})


def test_a_store_of_them_is_finished_confirmed_or_refused(noisy, store, tmp_path):
    folder = tmp_path / "s"
    store(noisy, shard_size=2)
    want = snapshot(folder)
    (folder / "manifest.json").unlink()
    (folder / "latents-00001.safetensors").unlink()
    store(noisy, shard_size=3)
    assert snapshot(folder) == want
    with pytest.raises(StoreError, match=r"latent\.t_n: stored 400, wanted 300"):
        store(noisy, t_n=300)
    store(noisy, tmp_path / "t")  # beside the first: the same content is the same noise, no second observation
    save_file({"latent": latents(6)[5]}, noisy / "4.safetensors")
    before = latents_in(folder)
    assert len(store(noisy, shard_size=3)["images"]) == 5
    after = latents_in(folder)
    assert len(before.keys() & after) == 4 and all(torch.equal(before[c], after[c]) for c in before.keys() & after)


def test_one_latent_in_two_files_is_one_image_at_one_level(noisy, store, tmp_path):
    save_file({"latent": latents()[0]}, noisy / "copy.safetensors", metadata={"other": "bytes"})
    (noisy / "copy.txt").write_text("another caption")
    manifest = store(noisy)
    assert manifest["counts"]["exact_duplicates"] == 1 and len(manifest["images"]) == 5
    (noisy / "metadata.jsonl").write_text(json.dumps({"file_name": "copy.safetensors", "level": 5}))
    with pytest.raises(
        StoreError, match="0.safetensors and copy.safetensors are the same picture at different noise levels"
    ):
        store(noisy, tmp_path / "t", t_n_column="level")
