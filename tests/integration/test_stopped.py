"""SIGTERM, Ctrl-C and a full disk in every command: one line, finished work kept, nothing half written."""

import resource
import signal
import subprocess
import sys
import time

import pytest
from support.pictures import copy_emoji
from support.running import ROOT, process_env
from support.stores import snapshot


def commands(miniature, folder):
    """Module, flags and output folder of each command; what it reads is made of emoji."""
    images, base = folder / "emoji", ["--pretrained_model_name_or_path", miniature]
    sets = ["--train_data_dir", images, "--heldout_data_dir", folder / "other"]
    quick = ["--num_inference_steps", 2, "--resolution", 64, "--sampler", "full", "--batch_size", 1]
    return {
        "latents": ("sdxl_ambient.latents", [*base, "--train_data_dir", images, "--resolution", 64, "--shard_size", 1]),
        "generate": ("eval.generate", [*base, "--train_data_dir", images, *quick, "--num_images", 24]),
        "embed": ("eval.embed", ["--image_dir", images, "--embedder", "pixel"]),
        "attack": ("eval.attack", [*base, *sets, "--embedder", "pixel", "--resolution", 64]),
        "preview": ("sdxl_ambient.preview", [*base, "--train_data_dir", images, "--resolution", 64]),
    }


def start(module, flags, output, limit=None):
    command = [sys.executable, "-m", module, *map(str, flags), "--output_dir", str(output)]
    set_limit = None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=process_env(), cwd=ROOT, preexec_fn=set_limit, **pipes)


def told(errors):
    return [line for line in errors.splitlines() if "Traceback" in line or "stopped by" in line or "error:" in line]


def made(output):
    """What is there for good: no lock, no temporary file."""
    return {name for name in snapshot(output) if not name.rsplit("/", 1)[-1].startswith(".")} if output.is_dir() else set()


@pytest.mark.parametrize(
    "name", ["latents", "generate", *(pytest.param(n, marks=pytest.mark.slow) for n in ("embed", "attack", "preview"))]
)
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_a_command_in_one_line(miniature, tmp_path, name, number):
    copy_emoji(tmp_path / "emoji", 24), copy_emoji(tmp_path / "other", 48)
    module, flags = commands(miniature, tmp_path)[name]
    process = start(module, flags, tmp_path / "out")
    deadline = time.monotonic() + 120
    while not made(tmp_path / "out") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    errors = process.communicate(timeout=120)[1]
    if process.returncode == 0:
        return  # it was at its end already
    assert process.returncode == 128 + number, errors[-2000:]
    assert len(told(errors)) == 1 and "stopped by" in told(errors)[0] and "the same command goes on" in told(errors)[0]
    kept = {n: d for n, d in snapshot(tmp_path / "out").items() if not n.endswith((".json", ".lock"))}
    assert not [n for n in snapshot(tmp_path / "out") if ".tmp" in n]
    again = start(module, flags, tmp_path / "out")
    assert (again.communicate(timeout=300) and again.returncode) == 0
    whole = snapshot(tmp_path / "out")
    assert all(whole[n] == d for n, d in kept.items() if n in whole)


@pytest.mark.parametrize(
    "name", ["latents", *(pytest.param(n, marks=pytest.mark.slow) for n in ("generate", "embed", "attack"))]
)
def test_a_full_disk_ends_a_command_in_one_line(miniature, tmp_path, name):
    copy_emoji(tmp_path / "emoji", 12), copy_emoji(tmp_path / "other", 24)
    module, flags = commands(miniature, tmp_path)[name]
    process = start(module, flags, tmp_path / "out", limit=3000)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 2 and len(told(errors)) == 1, errors[-2000:]
    assert not [n for n in snapshot(tmp_path / "out") if ".tmp" in n] if (tmp_path / "out").is_dir() else True
    again = start(module, flags, tmp_path / "out")
    errors = again.communicate(timeout=300)[1]
    assert again.returncode == 0, errors[-2000:]
