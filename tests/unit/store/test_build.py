"""The store of noisy latents: one observation per image, ever (invariant 3), and nothing clean in it (invariant 4)."""

import base64
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from support.stores import equal, latents_in, load_file, snapshot

from sdxl_ambient.config.data import DataOptions
from sdxl_ambient.config.settings import settings_of
from sdxl_ambient.config.shared import ModelOptions
from sdxl_ambient.errors import ImagesMissing, ModelError, NoiseKeyError, StoreError
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.images.load import load_rgb
from sdxl_ambient.latents import main
from sdxl_ambient.models.load import load_encoders
from sdxl_ambient.models.vae import encode_image
from sdxl_ambient.provenance import hash_bytes, hash_json
from sdxl_ambient.store.build import build_store
from sdxl_ambient.store.observation import draw_z, noise_key
from sdxl_ambient.store.scan import content_hash
from sdxl_ambient.store.settings import StoreSettings


def clean_latents(images: Path, encoders, resolution=64) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(images.glob("*.png")):
        image = load_rgb(path)
        content = content_hash(image)
        found[content] = encode_image(encoders.vae, Geometry(resolution).apply(image, content)[0])
    return found


def command(images, output, miniature, *more) -> list[str]:
    """The command line, with the flags in ``more`` (name, value, …) added or in place of the usual ones."""
    flags = {
        "--pretrained_model_name_or_path": miniature, "--train_data_dir": images, "--output_dir": output,
        "--resolution": 64, "--shard_size": 2,
    }  # fmt: skip
    flags.update(zip(more[::2], more[1::2], strict=True))
    return [str(word) for flag in flags.items() for word in flag]


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


# -- invariant 3: one observation per image --------------------------------------------------------------------


def test_the_draw_depends_on_the_key_and_the_pixels_alone(build, emoji, tmp_path):
    key = tmp_path / "key"
    build(emoji, tmp_path / "a" / "s", noise_key_file=key)
    want = latents_in(tmp_path / "a" / "s")
    assert len(want) == 6
    # Other file names, another order, other file bytes and captions, other shards, in the company of other pictures.
    shuffled = tmp_path / "shuffled"
    shuffled.mkdir()
    for i, path in enumerate(sorted(emoji.glob("*.png"), reverse=True)):
        Image.open(path).save(shuffled / f"{i}.png", compress_level=1)
        (shuffled / f"{i}.txt").write_text(f"caption {i}")
    build(shuffled, tmp_path / "b" / "s", noise_key_file=key, shard_size=1)
    assert equal(want, latents_in(tmp_path / "b" / "s"))
    for path in sorted(shuffled.glob("*.png"))[:3]:
        path.unlink()
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(shuffled / "other.png")
    (shuffled / "other.txt").write_text("grey")
    build(shuffled, tmp_path / "c" / "s", noise_key_file=key, shard_size=3)
    few = latents_in(tmp_path / "c" / "s")
    shared = few.keys() & want.keys()
    assert len(shared) == 3 and all(torch.equal(few[k], want[k]) for k in shared)
    # Another key, other noise.
    build(emoji, tmp_path / "d" / "s", noise_key_file=tmp_path / "key2")
    other = latents_in(tmp_path / "d" / "s")
    assert all((other[k] - want[k]).abs().mean() > 0.3 for k in want)


def test_a_rerun_changes_nothing(build, emoji, tmp_path):
    first = build(emoji, tmp_path / "s", shard_size=4)
    before = snapshot(tmp_path / "s")
    assert build(emoji, tmp_path / "s", shard_size=1) == first  # with a new random key, too
    assert snapshot(tmp_path / "s") == before


def test_an_interrupted_store_is_finished_without_drawing_anew(build, emoji, tmp_path):
    store = tmp_path / "s"
    build(emoji, store, shard_size=2)
    want = latents_in(store)
    (store / "manifest.json").unlink()
    (store / "latents-00002.safetensors").unlink()
    (store / ".latents-00002.0000.tmp.safetensors").write_bytes(b"half")
    kept = snapshot(store)
    build(emoji, store, shard_size=2)
    after = snapshot(store)
    for name in ("latents-00000.safetensors", "latents-00001.safetensors"):
        assert after[name] == kept[name]
    new = latents_in(store)
    assert new.keys() == want.keys() and sum(torch.equal(new[k], want[k]) for k in want) == 4
    assert (store / "manifest.json").is_file()


def test_a_damaged_shard_is_not_drawn_anew(build, emoji, tmp_path):
    store = tmp_path / "s"
    build(emoji, store, shard_size=2)
    shard = store / "latents-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    before = snapshot(store)
    with pytest.raises(StoreError, match="latents-00001.safetensors is damaged; .* second observation"):
        build(emoji, store, shard_size=2)
    assert snapshot(store) == before


def test_exact_duplicates_share_one_draw(build, emoji, tmp_path):
    path = sorted(emoji.glob("*.png"))[0]
    Image.open(path).save(emoji / "copy.png", compress_level=1)
    (emoji / "copy.txt").write_text("the same picture")
    manifest = build(emoji, tmp_path / "s")
    assert manifest["counts"]["files"] == 7 and manifest["counts"]["images"] == 6 == len(latents_in(tmp_path / "s"))
    assert manifest["counts"]["exact_duplicates"] == 1
    assert sorted(len(i["captions"]) for i in manifest["images"]) == [1, 1, 1, 1, 1, 2]


def test_new_captions_keep_the_latents_bitwise(build, emoji, tmp_path):
    store = tmp_path / "s"
    before = build(emoji, store)
    want = snapshot(store)
    text = (emoji / "metadata.jsonl").read_text()
    (emoji / "metadata.jsonl").write_text(re.sub(r'"text": "', '"text": "a drawing of ', text))
    after = build(emoji, store)
    got = snapshot(store)
    assert all(got[n] == want[n] for n in want if n.startswith("latents-"))
    empty = hash_bytes(b"")
    assert before["prompts"].keys() & after["prompts"].keys() == {empty} and len(after["prompts"]) == 7
    assert after["counts"]["captions"] == 6  # the empty caption, which training may show in their place, is nobody's
    for caption, file in after["prompts"].items():
        assert {f"{caption}.embeds", f"{caption}.pooled"} <= set(load_file(store / file))


# -- several processes, interruption, through the command line ------------------------------------------------


def environment(**more):
    repository = str(Path(__file__).parents[3])
    return {**os.environ, "PYTHONPATH": repository, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


def test_two_processes_draw_what_one_draws(emoji, miniature, tmp_path):
    key = tmp_path / "key"
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(command(emoji, tmp_path / "a" / "s", miniature, "--noise_key_file", key)) == 0
    finally:
        torch.set_num_threads(torch_threads)
    Image.new("RGB", (3, 3)).save(emoji / "tiny.png")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += ["-m", "sdxl_ambient.latents"]
    run = subprocess.run(
        [*launch, *command(emoji, tmp_path / "b" / "s", miniature, "--noise_key_file", key, "--shard_size", 100)],
        env=environment(ACCELERATE_USE_CPU="true"), capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert equal(latents_in(tmp_path / "a" / "s"), latents_in(tmp_path / "b" / "s"))
    one, two = (json.loads((tmp_path / d / "s" / "manifest.json").read_text()) for d in "ab")
    assert one["images"] == two["images"] and one["prompts"].keys() == two["prompts"].keys()
    assert run.stdout.count("6 images, 6 captions, 1 skipped") == 1  # one process speaks
    assert "tiny.png: no caption" in run.stdout and two["counts"]["skipped"] == 1
    names = {p.name for p in (tmp_path / "b" / "s").iterdir()}
    # A shard for each process, though all six would fit into one: there really were two.
    assert len([n for n in names if n.startswith("latents-")]) == 2 and not [n for n in names if n.startswith(".")]


def test_killed_in_the_middle_and_resumed(miniature, tmp_path):
    from support.pictures import copy_emoji

    images, store = copy_emoji(tmp_path / "images", 40), tmp_path / "s"
    argv = command(images, store, miniature, "--shard_size", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "sdxl_ambient.latents", *argv], env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while not len(list(store.glob("latents-*.safetensors"))) >= 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (store / "manifest.json").exists()
    before = latents_in(store)
    assert 3 <= len(before) < 40
    assert main(argv) == 0
    after = latents_in(store)
    assert len(after) == 40 and all(torch.equal(after[k], before[k]) for k in before)


# -- invariant 4: nothing clean, and no key -------------------------------------------------------------------


@pytest.mark.parametrize("t_n", [100, 500, 900])
def test_a_stored_latent_is_the_clean_one_under_noise(build, emoji, tmp_path, encoders, schedule, t_n):
    """x_n = α_n x_0 + σ_n z with z standard normal: right level, right noise, and nothing else stored."""
    manifest = build(emoji, tmp_path / "s", t_n=t_n)
    clean, noisy = clean_latents(emoji, encoders), latents_in(tmp_path / "s")
    assert clean.keys() == noisy.keys()
    alpha, sigma = schedule.alpha(torch.tensor([t_n])), schedule.sigma(torch.tensor([t_n]))
    z = torch.cat([((noisy[k].double() - alpha * clean[k]) / sigma).flatten() for k in sorted(clean)])
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-4
    x_0 = torch.cat([clean[k].flatten() for k in sorted(clean)]).double()
    x_n = torch.cat([noisy[k].flatten() for k in sorted(clean)]).double()
    centred = x_0 - x_0.mean()
    predicted = alpha * centred.std() / (alpha**2 * centred.var() + sigma**2).sqrt()
    assert np.corrcoef(x_0, x_n)[0, 1] == pytest.approx(predicted.item(), abs=0.03)
    assert all(i["t_n"] == t_n for i in manifest["images"])


def test_noise_of_pictures_and_of_levels_is_independent(build, emoji, tmp_path, encoders, schedule):
    """The same z at two levels could simply be solved for the picture."""
    clean, noise = clean_latents(emoji, encoders), []
    for t_n in (500, 300):
        build(emoji, tmp_path / str(t_n) / "s", t_n=t_n, noise_key_file=tmp_path / "key")
        noisy, t = latents_in(tmp_path / str(t_n) / "s"), torch.tensor([t_n])
        z = [(noisy[k] - schedule.alpha(t) * clean[k]) / schedule.sigma(t) for k in sorted(clean)]
        noise.append(torch.stack(z).flatten(1).numpy())
    correlations = np.corrcoef(np.concatenate(noise))
    assert np.abs(correlations - np.eye(12)).max() < 5 / np.sqrt(1024)


def test_no_clean_latent_and_no_pixel_is_stored(build, emoji, tmp_path, encoders):
    store = tmp_path / "s"
    build(emoji, store)
    clean = clean_latents(emoji, encoders)
    tensors = [t for path in store.glob("*.safetensors") for t in load_file(path).values()]
    assert len(tensors) == 6 + 2 * (6 + 1)
    for tensor in tensors:
        for x_0 in clean.values():
            assert tensor.shape != x_0.shape or (tensor - x_0).abs().mean() > 0.3
    allowed = r"plan\.json|manifest\.json|latents-\d{5}\.safetensors|prompts-[0-9a-f]+-[0-9a-f]+\.safetensors"
    assert all(re.fullmatch(allowed, p.name) for p in store.iterdir())
    everything = b"".join(snapshot(store).values())
    for path in emoji.glob("*.png"):
        assert path.read_bytes()[60:160] not in everything
        assert np.asarray(load_rgb(path))[28:36].tobytes() not in everything


def test_a_clean_store_says_that_it_is_clean(build, emoji, tmp_path, encoders):
    said = []
    build(emoji, tmp_path / "s", t_n=None, log=said.append)
    assert equal(latents_in(tmp_path / "s"), clean_latents(emoji, encoders))
    assert any("holds clean latents, which decode to the images" in s for s in said)


def test_the_key_is_in_no_file_and_no_message(build, emoji, tmp_path, capfd, monkeypatch):
    key, said = tmp_path / "key", []
    build(emoji, tmp_path / "s", noise_key_file=key, log=said.append)
    random = []
    monkeypatch.setattr("sdxl_ambient.store.build.noise_key", lambda path: random.append(noise_key(path)) or random[-1])
    build(emoji, tmp_path / "deep" / "s", log=said.append)
    assert key.stat().st_mode & 0o777 == 0o600 and len(random) == 1
    captured = capfd.readouterr()
    texts = [b"".join(snapshot(tmp_path / d).values()) for d in ("s", "deep")]
    texts += [" ".join(said).encode(), (captured.out + captured.err).encode()]
    for secret in (noise_key(key), random[0]):
        spellings = [secret, secret.hex().encode(), secret.hex().upper().encode(), base64.b64encode(secret)[:40]]
        spellings += [base64.urlsafe_b64encode(secret)[:40], secret[::-1], secret[:16], secret.hex()[:32].encode()]
        for spelling in spellings:
            assert not any(spelling in text for text in texts)


def test_a_key_that_others_can_read_is_refused_before_anything_is_drawn(emoji, miniature, tmp_path, capsys):
    key = tmp_path / "key"
    noise_key(key)
    key.chmod(0o644)
    assert main(command(emoji, tmp_path / "s", miniature, "--noise_key_file", key)) == 2
    assert "can be read by others; make it mode 600" in capsys.readouterr().err
    assert not latents_in(tmp_path / "s")
    with pytest.raises(SystemExit):
        main(command(emoji, tmp_path / "s", miniature, "--noise_key_file", tmp_path / "s" / "key"))
    assert "lies inside" in capsys.readouterr().err and not (tmp_path / "s" / "key").exists()


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
    """A limit on the size of files stands in for a full disk: a shard of one latent fits, prompt embeddings do not."""
    store = tmp_path / "s"

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    run = subprocess.run(
        [sys.executable, "-m", "sdxl_ambient.latents", *command(emoji, store, miniature, "--shard_size", "1")],
        env=environment(), capture_output=True, text=True, timeout=120, preexec_fn=limit,
    )  # fmt: skip
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 2 and last.startswith("sdxl_ambient.latents: error: "), run.stderr[-2000:]
    assert "prompts-" in last and "can't be written" in last and "Traceback" not in run.stderr
    assert len(latents_in(store)) == 6 and not (store / "manifest.json").exists()
    assert not list(store.glob(".*"))
    before = latents_in(store)
    assert main(command(emoji, store, miniature, "--shard_size", "1")) == 0
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
            assert not file.metadata()
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


def test_a_uniform_store_is_drawn_as_ever(build, emoji, tmp_path, encoders, schedule):
    """z follows from the key, the settings with the store's t_n, and the content: bit for bit what older stores hold."""
    manifest = build(emoji, tmp_path / "s", noise_key_file=tmp_path / "key")
    key, what = noise_key(tmp_path / "key"), hash_json(manifest["fingerprint"]["latent"])
    assert set(manifest["fingerprint"]["latent"]) == {
        *("vae", "scaling_factor", "schedule", "resolution", "center_crop", "t_n")
    }  # fmt: skip
    stored = latents_in(tmp_path / "s")
    for content, x_0 in clean_latents(emoji, encoders).items():
        z = draw_z(key, what, content, x_0.shape).float()
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


def test_one_picture_at_two_levels_has_independent_noise(build, emoji, tmp_path, encoders, schedule):
    """Under one key and one --t_n, with the levels told by the column: the same z could be solved for the picture."""
    noise = []
    for level in (300, 600):
        contents = with_levels(emoji, *[level] * 6)
        store = tmp_path / str(level) / "s"
        build(emoji, store, t_n_column="level", noise_key_file=tmp_path / "key")
        z = noise_of(store, emoji, encoders, schedule)
        noise.append(torch.stack([z[c] for c in contents]).flatten(1).numpy())
    correlations = np.corrcoef(np.concatenate(noise))
    assert np.abs(correlations - np.eye(12)).max() < 5 / np.sqrt(1024)


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
