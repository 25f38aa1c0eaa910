"""Invariant 3: whatever befalls a store, its noise is the picture's one path, recovered from the stored latents."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from support.pictures import copy_emoji
from support.stores import clean_latents, command, environment, latents_in

from sdxl_ambient.latents import main
from sdxl_ambient.store.keys import noise_key
from sdxl_ambient.store.observation import draw_z
from sdxl_ambient.store.plan import latent_hash_of

MODULE = ["-m", "sdxl_ambient.latents"]


@pytest.fixture
def first(tmp_path, miniature):
    """Twelve pictures, and their first store, six shards of it."""
    images = copy_emoji(tmp_path / "images", 12)
    assert main(command(images, tmp_path / "first/latents", miniature)) == 0
    return images


def another_folder(images, folder, miniature):
    assert main(command(images, folder, miniature, "--shard_size", 5)) == 0


def another_level(images, folder, miniature):
    assert main(command(images, folder, miniature, "--t_n", 300)) == 0


def killed(images, folder, miniature):
    argv = [sys.executable, *MODULE, *command(images, folder, miniature, "--shard_size", 1)]
    process = subprocess.Popen(argv, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not list(folder.glob("latents-*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (folder / "manifest.json").exists()
    assert main(command(images, folder, miniature, "--shard_size", 1)) == 0


def deleted_shard(images, folder, miniature):
    shutil.copytree(folder.parent.parent / "first/latents", folder)
    (folder / "latents-00003.safetensors").unlink()
    assert main(command(images, folder, miniature)) == 0


def two_processes(images, folder, miniature):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *MODULE]
    run = subprocess.run(
        [*launch, *command(images, folder, miniature)], env=environment(ACCELERATE_USE_CPU="true"), capture_output=True,
        text=True, timeout=180,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]


def grown(images, folder, miniature):
    hidden = images.parent / "hidden"
    shutil.copytree(images, hidden)
    rows = (images / "metadata.jsonl").read_text().splitlines()
    (hidden / "metadata.jsonl").write_text("\n".join(rows[:5]) + "\n")
    for row in rows[5:]:
        (hidden / json.loads(row)["file_name"]).unlink()
    assert main(command(hidden, folder, miniature)) == 0
    assert len(latents_in(folder)) == 5
    assert main(command(images, folder, miniature)) == 0


@pytest.mark.parametrize("happens", [another_folder, another_level, killed, deleted_shard, two_processes, grown])
def test_its_noise_is_the_path_of_the_first_draw(first, tmp_path, miniature, encoders, schedule, happens):
    store = tmp_path / "other/latents"
    happens(first, store, miniature)
    clean, key, manifest = clean_latents(first, encoders), noise_key("kept").secret, {}
    for folder in (tmp_path / "first/latents", store):
        stored, manifest = latents_in(folder), json.loads((folder / "manifest.json").read_text())
        assert len(stored) == len(manifest["images"]) == 12
        for entry in manifest["images"]:
            content, t = entry["content"], torch.tensor(entry["t_n"])
            noise = (stored[content].double() - schedule.alpha(t) * clean[content].double()) / schedule.sigma(t)
            what = latent_hash_of(manifest["fingerprint"]["latent"], entry)
            path = draw_z(key, what, content, schedule, entry["t_n"], noise.shape)
            assert np.corrcoef(noise.flatten(), path.flatten())[0, 1] > 1 - 1e-9
            assert (noise - path).abs().max() < 1e-5  # float32 of the stored latent, over σ
    assert {i["t_n"] for i in manifest["images"]} == ({300} if happens is another_level else {500})
