"""Invariant 3: one observation per picture, ever."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from support.stores import command, environment, equal, latents_in, load_file, snapshot

from sdxl_ambient.errors import StoreError
from sdxl_ambient.latents import main
from sdxl_ambient.provenance import hash_bytes


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
    build(emoji, tmp_path / "d" / "s", noise_key_file=tmp_path / "key2", allow_second_observation=True)
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
    assert equal(latents_in(store), want)  # the third shard too
    assert not list(store.glob(".*.tmp*"))
    assert (store / "manifest.json").is_file()


def test_a_damaged_shard_is_not_drawn_anew(build, emoji, tmp_path):
    for key, advice in (("none", "would be a second observation of its images"), ("kept", "made again with the same noise")):
        store = tmp_path / key / "s"
        build(emoji, store, shard_size=2, noise_key=key, allow_second_observation=True)
        shard = store / "latents-00001.safetensors"
        shard.write_bytes(shard.read_bytes()[:-100])
        before = snapshot(store)
        with pytest.raises(StoreError, match=f"latents-00001.safetensors is damaged .*; .*{advice}"):
            build(emoji, store, shard_size=2, noise_key=key)
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
    placed = [[{**i, "shard": None} for i in m["images"]] for m in (one, two)]
    assert placed[0] == placed[1] and one["prompts"].keys() == two["prompts"].keys()
    assert run.stdout.count("6 images, 6 captions, 1 skipped") == 1  # one process speaks
    assert "tiny.png: no caption" in run.stdout and two["counts"]["skipped"] == 1
    names = {p.name for p in (tmp_path / "b" / "s").iterdir()}
    # A shard for each process, though all six would fit into one: there really were two.
    assert len([n for n in names if n.startswith("latents-")]) == 2
    assert {n for n in names if n.startswith(".")} == {".lock"}


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
