"""Invariant 6: an interrupted and resumed run ends as the uninterrupted one, bit for bit; and what ends a run early."""

import random
import subprocess
import sys
import time

import pytest
import torch
from support.running import ROOT, SCRIPT, arguments, assert_identical, launch, process_env, states

from sdxl_ambient.provenance import read_json
from sdxl_ambient.training.checkpoint import checkpoints


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    from support.pictures import copy_emoji

    return copy_emoji(tmp_path_factory.mktemp("data") / "emoji", 6)


@pytest.fixture(scope="module")
def uninterrupted(pictures, tmp_path_factory):
    """Eight steps at one go, and the store that every other run reads."""
    output = tmp_path_factory.mktemp("run") / "whole"
    launch(arguments(pictures, output, max_train_steps=8, checkpointing_steps=100))
    return output


def start(uninterrupted, output, *more, before="", options=None, **changes):
    """The script as a process, on the finished run's store; ``before`` is Python that runs ahead of it."""
    if options is None:
        options = arguments(None, output, **{"max_train_steps": 8, "checkpointing_steps": 100, **changes})
        options += ["--latents_dir", str(uninterrupted / "latents"), "--resume_from_checkpoint", "latest"]
    options = [*options, *more]
    imports = "import accelerate, torch, train_sdxl_ambient as script\nfrom sdxl_ambient.training import step"
    code = f"import sys; sys.argv[0] = {SCRIPT[0]!r}\n{imports}\n{before}\nsys.exit(script.main())"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-u", "-c", code, *options], env=process_env(), cwd=ROOT, **pipes)


# Told to stop in the middle of its third step.
SIGNAL = """
import os, signal
objective, calls = step.ambient_objective, []
def told(*arguments, **keywords):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return objective(*arguments, **keywords)
step.ambient_objective = told
"""


FAILING = SIGNAL.replace("os.kill(os.getpid(), signal.SIGTERM)", "raise RuntimeError('CUDA out of memory')")


# The loss of the step's first image is no number in steps 3 and 4.
NAN = """
objective, calls = step.ambient_objective, []
def broken(*arguments, **keywords):
    calls.append(1)
    losses = objective(*arguments, **keywords)
    if len(calls) in (3, 4):
        losses.ambient = losses.ambient * torch.tensor([float('nan')] + [1.0] * (len(losses.ambient) - 1))
        losses.total = losses.ambient.mean()
    return losses
step.ambient_objective = broken
"""


def test_sigterm_leaves_a_checkpoint_and_the_resumed_run_ends_as_the_whole_one(uninterrupted, tmp_path):
    first = start(uninterrupted, tmp_path / "out", before=SIGNAL)
    said, errors = first.communicate(timeout=300)
    assert first.returncode == 143, errors[-2000:]
    assert "Stopped by SIGTERM after step 3" in said
    assert [p.name for p in checkpoints(tmp_path / "out")] == ["checkpoint-3"]
    second = start(uninterrupted, tmp_path / "out")
    said, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors[-2000:]
    assert_identical(states(tmp_path / "out/checkpoint-8"), states(uninterrupted / "checkpoint-8"))


def test_an_error_leaves_the_last_whole_step_behind(uninterrupted, tmp_path):
    first = start(uninterrupted, tmp_path / "out", before=FAILING)
    said, errors = first.communicate(timeout=300)
    assert first.returncode == 1 and "CUDA out of memory" in errors and "Saved step 2 before" in said
    second = start(uninterrupted, tmp_path / "out")
    assert second.communicate(timeout=300) and second.returncode == 0
    assert_identical(states(tmp_path / "out/checkpoint-8"), states(uninterrupted / "checkpoint-8"))


def test_an_error_in_a_step_that_restores_leaves_none_of_its_samples_behind(uninterrupted, tmp_path):
    how = {"low_noise": "restore", "restore_steps": 1, "restore_teacher": "base", "restore_levels": "all"}
    whole = start(uninterrupted, tmp_path / "whole", **how)
    assert whole.communicate(timeout=300) and whole.returncode == 0
    first = start(uninterrupted, tmp_path / "out", before=FAILING, **how)
    said, _ = first.communicate(timeout=300)
    assert first.returncode == 1 and "Saved step 2 before" in said
    second = start(uninterrupted, tmp_path / "out", **how)
    assert second.communicate(timeout=300) and second.returncode == 0
    assert_identical(states(tmp_path / "out/checkpoint-8"), states(tmp_path / "whole/checkpoint-8"))


def test_gradients_that_are_no_numbers_are_left_out_and_reported(uninterrupted, tmp_path):
    run = start(uninterrupted, tmp_path / "out", before=NAN)
    said, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors[-2000:]
    assert "step 3: left out" in said and "step 4: left out; so far 2 step(s)" in said
    progress = read_json(tmp_path / "out/checkpoint-8/checkpoint.json")["progress"]
    assert progress["skipped"]["steps"] == 2 and sum(progress["skipped"]["images"].values()) == 2
    lora, *_ = states(tmp_path / "out/checkpoint-8")
    assert all(torch.isfinite(weight).all() for weight in lora.values())
    run = start(uninterrupted, tmp_path / "strict", "--max_skipped_steps", "1", before=NAN)
    said, errors = run.communicate(timeout=300)
    assert run.returncode == 2 and "2 of them in a row; lower --learning_rate" in errors
    assert "Saved step 3" in said


# float16's gradient scaler, which accelerate has on a GPU alone.
SCALER = """
class Scaled(accelerate.Accelerator):
    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=float(2**10))
        self.native_amp = True
accelerate.Accelerator = Scaled
"""


def test_losses_that_are_no_numbers_are_counted_with_a_gradient_scaler_too(uninterrupted, tmp_path):
    """It leaves out every step without finite gradients, and would go on so for ever without a word."""
    run = start(uninterrupted, tmp_path / "out", before=SCALER + NAN)
    said, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors[-2000:]
    assert "step 3: left out" in said and "step 4: left out; so far 2 step(s)" in said
    always = NAN.replace("len(calls) in (3, 4)", "len(calls) >= 3")
    run = start(uninterrupted, tmp_path / "strict", "--max_skipped_steps", "1", before=SCALER + always)
    said, errors = run.communicate(timeout=300)
    assert run.returncode == 2 and "2 of them in a row; lower --learning_rate" in errors
    lora, *_ = states(tmp_path / "strict/checkpoint-3")
    assert all(torch.isfinite(weight).all() for weight in lora.values())


def test_a_signal_while_images_are_encoded_ends_the_run_and_the_next_goes_on(pictures, tmp_path):
    options = arguments(pictures, tmp_path / "out", max_train_steps=1)
    told = """
import os, signal
import sdxl_ambient.store.build as build
encode, calls = build.encode_image, []
def slow(*arguments):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return encode(*arguments)
build.encode_image = slow
"""
    run = start(None, tmp_path / "out", "--shard_size", "2", before=told, options=options)
    said, errors = run.communicate(timeout=300)
    assert run.returncode == 143, errors[-2000:]
    assert "Stopped by SIGTERM before the first step" in said
    shards = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/latents").glob("latents-*.safetensors")}
    assert len(shards) == 1 and not (tmp_path / "out/latents/manifest.json").exists()
    run = start(None, tmp_path / "out", "--shard_size", "2", options=options)
    assert run.communicate(timeout=300) and run.returncode == 0
    assert {p: p.stat().st_mtime_ns for p in shards} == shards


def test_the_time_limit_stops_with_a_checkpoint(uninterrupted, tmp_path):
    run = start(uninterrupted, tmp_path / "out", "--time_limit", "1e-4")
    said, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors[-2000:]
    assert "Stopped by the time limit after step 1" in said
    assert [p.name for p in checkpoints(tmp_path / "out")] == ["checkpoint-1"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills_in_a_row_change_nothing(uninterrupted, tmp_path):
    """SIGKILL at a random moment of training, also while a checkpoint is written."""
    whole = start(uninterrupted, tmp_path / "whole", max_train_steps=60)
    assert whole.communicate(timeout=300) and whole.returncode == 0
    moments, changes = random.Random(0), {"max_train_steps": 60, "checkpointing_steps": 1, "checkpoints_total_limit": 2}
    for _ in range(20):
        run = start(uninterrupted, tmp_path / "out", **changes)
        while not run.stdout.readline().startswith("Training"):
            assert run.poll() is None, run.stderr.read()[-2000:]
        time.sleep(moments.uniform(0, 1))
        run.kill()
        run.communicate()
    last = start(uninterrupted, tmp_path / "out", **changes)
    said, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors[-2000:]
    assert "Resuming from" in said
    assert_identical(states(tmp_path / "out/checkpoint-60"), states(tmp_path / "whole/checkpoint-60"))
