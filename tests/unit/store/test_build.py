"""The store of noisy latents: built, confirmed, refused. What it promises of observations and keys: tests/invariants."""

import json
import resource
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from support.stores import clean_latents, command, environment, equal, latents_in

from sdxl_ambient.config.data import DataOptions
from sdxl_ambient.config.settings import settings_of
from sdxl_ambient.config.shared import ModelOptions
from sdxl_ambient.errors import ImagesMissing, ModelError, NoiseKeyError, StoreError
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.images.load import load_rgb
from sdxl_ambient.latents import main
from sdxl_ambient.models.load import load_encoders
from sdxl_ambient.models.vae import encode_image
from sdxl_ambient.provenance import hash_bytes
from sdxl_ambient.store.build import build_store
from sdxl_ambient.store.keys import noise_key
from sdxl_ambient.store.observation import draw_z
from sdxl_ambient.store.plan import latent_hash_of
from sdxl_ambient.store.scan import content_hash
from sdxl_ambient.store.settings import StoreSettings
from sdxl_ambient.store.shards import tensor_hash

# -- raw pixels => latents ------------------------------------------------------------------------------------


def test_latents_are_the_posterior_mean_as_the_unet_sees_them(encoders, emoji):
    pixels, _ = Geometry(64).apply(load_rgb(next(emoji.glob("*.png"))), "00" * 32)
    latent = encode_image(encoders.vae, pixels)
    with torch.no_grad():
        want = encoders.vae.encode(pixels[None]).latent_dist.mean[0] * encoders.vae.config.scaling_factor
        decoded = encoders.vae.decode(latent[None] / encoders.vae.config.scaling_factor).sample[0]
    assert latent.shape == (4, 16, 16) and torch.equal(latent, want)
    assert (decoded - pixels).square().mean() < 0.03


def test_a_vae_with_damaged_weights_is_named(miniature, build, emoji, tmp_path):
    broken = load_encoders(str(miniature))
    next(broken.vae.encoder.parameters()).data.fill_(float("nan"))
    with pytest.raises(ModelError, match="VAE gives values that are not finite in torch.float32") as error:
        build(emoji, tmp_path / "s", encoders=broken)
    assert "\n" not in str(error.value)


def test_resolution_must_fit_the_model(build, emoji, tmp_path):
    with pytest.raises(ModelError, match="--resolution: 60 is not a multiple of 16"):
        build(emoji, tmp_path / "s", resolution=60)


# -- bad input ------------------------------------------------------------------------------------------------


def test_unusable_pictures_are_skipped_counted_and_printed(build, emoji, tmp_path):
    (emoji / "text.png").write_text("no picture")
    (emoji / "text.txt").write_text("caption")
    Image.new("RGB", (1, 1)).save(emoji / "dot.png")
    (emoji / "dot.txt").write_text("caption")
    Image.new("RGB", (64, 64)).save(emoji / "silent.png")
    said = []
    manifest = build(emoji, tmp_path / "s", log=said.append)
    assert manifest["counts"]["images"] == 6 and manifest["counts"]["skipped"] == 3
    assert {s["file"]: s["reason"].split(",")[0].split(":")[0] for s in manifest["skipped"]} == {
        "text.png": "not an image", "dot.png": "too small", "silent.png": "no caption (a metadata file"
    }  # fmt: skip
    assert "3 of 9 images are skipped:" in said and "  dot.png: too small: 1x1 pixels" in " ".join(said)
    assert json.loads((tmp_path / "s" / "manifest.json").read_text())["skipped"] == manifest["skipped"]


def test_no_usable_picture_at_all_is_one_line(build, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_text("no picture")
    with pytest.raises(ImagesMissing, match="none of the 1 images in .* can be used: no caption"):
        build(tmp_path / "images", tmp_path / "s")
    with pytest.raises(ImagesMissing, match="none of the 1 images in .* can be used: not an image"):
        build(tmp_path / "images", tmp_path / "s", instance_prompt="a picture")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--caption_column", "caption"], "--caption_column: 'caption' is not one of: file_name, text"),
        (["--pretrained_model_name_or_path", "/nowhere"], "'/nowhere'"),
        (["--pretrained_vae_model_name_or_path", "/nowhere"], "the VAE of '/nowhere' can't be loaded"),
        (["--resolution", "72"], "--resolution: 72 is not a multiple of 16"),
    ],
)
def test_the_command_fails_in_one_line(emoji, miniature, tmp_path, capsys, more, message):
    assert main(command(emoji, tmp_path / "s", miniature, *more)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sdxl_ambient.latents: error: ") and message in error


def test_a_full_disk_is_one_line_and_leaves_whole_shards(emoji, miniature, tmp_path):
    """A limit on the size of files stands in for a full disk: a shard of two latents fits, prompt embeddings do not."""
    store = tmp_path / "s"

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    run = subprocess.run(
        [sys.executable, "-m", "sdxl_ambient.latents", *command(emoji, store, miniature, "--shard_size", "2")],
        env=environment(), capture_output=True, text=True, timeout=120, preexec_fn=limit,
    )  # fmt: skip
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 2 and last.startswith("sdxl_ambient.latents: error: "), run.stderr[-2000:]
    assert "prompts-" in last and "can't be written" in last and "Traceback" not in run.stderr
    assert len(latents_in(store)) == 6 and not (store / "manifest.json").exists()
    assert {p.name for p in store.glob(".*")} == {".lock"}
    before = latents_in(store)
    assert main(command(emoji, store, miniature, "--shard_size", "2")) == 0
    assert equal(latents_in(store), before)


def test_a_picture_that_changes_while_it_is_encoded_is_noticed(build, emoji, tmp_path, monkeypatch):
    monkeypatch.setattr("sdxl_ambient.store.build.content_hash", lambda image: "ff" * 32)
    with pytest.raises(StoreError, match="changed while it was being encoded"):
        build(emoji, tmp_path / "s")


def test_photographs_keep_their_time_ids_in_the_store(build, photographs, tmp_path):
    """Invariant 8, stored: the size as seen and the crop as made."""
    manifest = build(photographs, tmp_path / "s")
    found = sorted(i["time_ids"] for i in manifest["images"])
    assert found == [[400, 600, 0, 16, 64, 64], [427, 640, 0, 16, 64, 64], [640, 427, 16, 0, 64, 64]]


def test_a_key_must_be_usable(build, emoji, tmp_path):
    (tmp_path / "key").write_text("short")
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(NoiseKeyError):
        build(emoji, tmp_path / "s", noise_key_file=tmp_path / "key")


def test_shards_hold_float32_and_nothing_but_tensors(build, emoji, tmp_path):
    from safetensors import safe_open

    build(emoji, tmp_path / "s")
    for path in (tmp_path / "s").glob("latents-*"):
        with safe_open(path, "pt") as file:
            hashes = file.metadata().pop("sha256")
            assert json.loads(hashes) == {name: tensor_hash(name, file.get_tensor(name)) for name in file.keys()}
            assert list(file.metadata()) == ["sha256"]
    assert {t.dtype for t in latents_in(tmp_path / "s").values()} == {torch.float32}


# -- noise levels of their own ----------------------------------------------------------------------------------


def with_levels(emoji: Path, *values):
    """Give the first pictures noise levels of their own, in the column ``level``."""
    rows = [json.loads(line) for line in (emoji / "metadata.jsonl").read_text().splitlines()]
    for row, value in zip(sorted(rows, key=lambda r: r["file_name"]), values, strict=False):
        row["level"] = value
    (emoji / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [content_hash(load_rgb(p)) for p in sorted(emoji.glob("*.png"))]


def noise_of(store: Path, images: Path, encoders, schedule) -> dict[str, torch.Tensor]:
    """z of every noisy latent in a store."""
    clean, noisy = clean_latents(images, encoders), latents_in(store)
    entries = json.loads((store / "manifest.json").read_text())["images"]
    t_n = {i["content"]: torch.tensor([i["t_n"]]) for i in entries if i["t_n"] is not None}
    return {c: (noisy[c] - schedule.alpha(t) * clean[c]) / schedule.sigma(t) for c, t in t_n.items()}


def test_the_noise_is_the_pictures_path(build, emoji, tmp_path, encoders, schedule):
    """z follows from the key, what the latent is, the content and the level, whatever else is set."""
    manifest = build(emoji, tmp_path / "s", noise_key_file=tmp_path / "key")
    key = noise_key("kept", tmp_path / "key").secret
    entries = {i["content"]: i for i in manifest["images"]}
    assert set(manifest["fingerprint"]["latent"]) == {
        *("vae", "scaling_factor", "schedule", "resolution", "center_crop", "t_n")
    }  # fmt: skip
    stored = latents_in(tmp_path / "s")
    for content, x_0 in clean_latents(emoji, encoders).items():
        what = latent_hash_of(manifest["fingerprint"]["latent"], entries[content])
        z = draw_z(key, what, content, schedule, 500, x_0.shape).float()
        assert torch.equal(stored[content], schedule.observe(x_0[None], torch.tensor([500]), z[None])[0])


def test_pictures_are_stored_at_their_own_levels(build, emoji, tmp_path, encoders, schedule):
    contents, said = with_levels(emoji, 300, -1, None, 0, 998), []
    manifest = build(emoji, tmp_path / "s", t_n_column="level", log=said.append)
    assert {i["content"]: i["t_n"] for i in manifest["images"]} == dict(
        zip(contents, [300, None, 500, 0, 998, 500], strict=True)
    )
    assert torch.equal(latents_in(tmp_path / "s")[contents[1]], clean_latents(emoji, encoders)[contents[1]])
    assert any("1 of 6 images are told to be clean" in s for s in said)
    noise = noise_of(tmp_path / "s", emoji, encoders, schedule)
    del noise[contents[3]]  # float32 leaves little of the noise at t_n = 0
    z = torch.cat([noise[c].double().flatten() for c in sorted(noise)])
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-4


def test_one_picture_at_two_levels_is_one_path(build, emoji, tmp_path, encoders, schedule):
    """Under one key, with the levels told by the column: x at 600 is x at 300 with fresh noise, in float32."""
    stored = {}
    for level in (300, 600):
        contents = with_levels(emoji, *[level] * 6)
        build(emoji, tmp_path / str(level) / "s", t_n_column="level")
        stored[level] = latents_in(tmp_path / str(level) / "s")
    r, nu = schedule.transition(torch.tensor([300]), torch.tensor([600]))
    low, high = (
        {t: noise_of(tmp_path / str(t) / "s", emoji, encoders, schedule) for t in (300, 600)}[t] for t in (300, 600)
    )
    xi = [((stored[600][c].double() - r * stored[300][c]) / nu).flatten() for c in contents]
    assert stats.kstest(torch.cat(xi).numpy(), "norm").pvalue > 1e-4
    z = torch.cat([low[c].flatten() for c in contents])
    assert abs(np.corrcoef(z, torch.cat(xi))[0, 1]) < 5 / np.sqrt(len(z))
    same = np.corrcoef(z, torch.cat([high[c].flatten() for c in contents]))[0, 1]
    v = [1 / schedule.snr(torch.tensor(t)) for t in (300, 600)]
    assert same == pytest.approx(float((v[0] / v[1]).sqrt()), abs=0.03)


def test_copies_of_a_picture_must_have_one_level(build, emoji, tmp_path):
    first = sorted(emoji.glob("*.png"))[0]
    Image.open(first).save(emoji / "zz.png", compress_level=1)
    with open(emoji / "metadata.jsonl", "a") as file:
        file.write(json.dumps({"file_name": "zz.png", "text": "a copy"}) + "\n")
    with_levels(emoji, 500)
    assert build(emoji, tmp_path / "s", t_n_column="level")["counts"]["images"] == 6  # 500, as the other has by default
    for level, shown in ((300, 300), (-1, -1)):
        with_levels(emoji, level)
        message = f"{first.name} and zz.png are the same picture at different noise levels, t_n = {shown} and 500; give both"
        with pytest.raises(StoreError, match=message):
            build(emoji, tmp_path / "t", t_n_column="level")
    assert not (tmp_path / "t").exists()


# -- captions ---------------------------------------------------------------------------------------------------


def test_the_instance_prompt_stands_in_for_a_missing_column(build, emoji, tmp_path):
    manifest = build(emoji, tmp_path / "s", caption_column="caption", instance_prompt="a picture")
    assert {c for i in manifest["images"] for c in i["captions"]} == {hash_bytes(b"a picture")}


# -- aspect ratios ----------------------------------------------------------------------------------------------


def test_latents_have_the_sizes_of_their_buckets(encoders, schedule, photographs, tmp_path):
    geometry = Geometry(64, True, ((48, 64), (64, 48)))
    settings = StoreSettings(geometry)
    manifest = build_store(photographs, tmp_path / "s", encoders, schedule, settings, log=lambda message: None)
    assert manifest["fingerprint"]["latent"]["buckets"] == [[48, 64], [64, 48]]
    stored = latents_in(tmp_path / "s")
    for entry in manifest["images"]:
        height, width = entry["time_ids"][:2]
        want = (64, 48) if height > width else (48, 64)
        assert tuple(entry["time_ids"][4:]) == want and stored[entry["content"]].shape == (4, want[0] // 4, want[1] // 4)
    with pytest.raises(StoreError, match=r"latent\.buckets: stored \[\[48, 64\], \[64, 48\]\], wanted None"):
        build_store(photographs, tmp_path / "s", encoders, schedule, StoreSettings(Geometry(64)), log=lambda message: None)
    with pytest.raises(ModelError, match="--aspect_ratio_buckets: 40 is not a multiple of 16"):
        build_store(photographs, tmp_path / "t", encoders, schedule, StoreSettings(Geometry(64, True, ((40, 64),))))


def test_a_store_is_told_every_option_of_it():
    own = {field.name for field in fields(DataOptions)} - {field.name for field in fields(ModelOptions)}
    geometry = {"resolution", "center_crop", "aspect_ratio_buckets", "bucket_reso_steps"}
    settings = {field.name: field for field in fields(StoreSettings)}
    assert settings.keys() - {"geometry", "keep_tokens"} == own - geometry - {"train_data_dir"}
    # With the defaults of the options.
    made = settings_of(StoreSettings, DataOptions(), geometry=Geometry(64), keep_tokens=False)
    assert made == StoreSettings(Geometry(64))
