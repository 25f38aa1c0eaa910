"""A run that is told to stop, fails or meets numbers that are none goes on where it was, to the same weights."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from running import ENV, ROOT, SCRIPT, arguments, assert_identical, launch, states

from sdxl_ambient.checkpoint import checkpoints
from sdxl_ambient.interruption import Interruption, Rescue, Skipped, not_finite
from sdxl_ambient.manifest import read_json


def test_the_first_signal_is_noted_and_the_second_ends_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with Interruption() as interruption:
        assert interruption.reason is None and interruption.exit_code == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.reason == "SIGTERM" and interruption.exit_code == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_time_limit_is_in_minutes_and_no_error():
    now = [100.0]
    interruption = Interruption(0.5, clock=lambda: now[0])
    now[0] = 129.9
    assert interruption.reason is None
    now[0] = 130.0
    assert interruption.reason == "the time limit" and interruption.exit_code == 0


def test_images_whose_loss_is_no_number_are_counted_over_a_resume():
    losses = torch.tensor([1.0, float("nan"), float("inf")])
    assert not_finite([(["a", "b", "c"], losses), ([], None)]) == ["b", "c"]
    skipped = Skipped(1)
    assert not skipped.note(["b", "c"])
    skipped.passed()
    again = Skipped(1)
    again.load_state_dict(skipped.state_dict())
    assert not again.note(["b"]) and again.note([])
    assert str(again) == "3 step(s) left out, their gradients weren't finite; images: b (2), c (1)"


class One:
    num_processes = 1

    def print(self, text):
        self.said = text


@pytest.mark.parametrize(("whole", "processes", "saved"), [(True, 1, [3]), (False, 1, []), (True, 2, [])])
def test_the_last_whole_step_is_saved_with_its_random_state_before_an_error_leaves(whole, processes, saved):
    accelerator, done = One(), []
    accelerator.num_processes = processes
    with (
        pytest.raises(RuntimeError, match="no memory"),
        Rescue(accelerator, lambda s: done.append((s, torch.rand(1))), 0) as rescue,
    ):
        torch.manual_seed(5)
        rescue.finished(3)
        torch.rand(7)
        rescue.whole = whole
        raise RuntimeError("no memory")
    assert [step for step, _ in done] == saved
    torch.manual_seed(5)
    assert all(torch.equal(drawn, torch.rand(1)) for _, drawn in done)


def test_an_error_while_saving_does_not_hide_the_first():
    def fail(step):
        raise OSError("no space")

    accelerator = One()
    with pytest.raises(RuntimeError, match="first"), Rescue(accelerator, fail, 0) as rescue:
        rescue.finished(1)
        raise RuntimeError("first")
    assert "could not be saved: no space" in accelerator.said


# -- the script ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    from conftest import copy_emoji

    return copy_emoji(tmp_path_factory.mktemp("data") / "emoji", 6)


@pytest.fixture(scope="module")
def uninterrupted(pictures, tmp_path_factory):
    """Eight steps at one go, and the store that every other run reads."""
    output = tmp_path_factory.mktemp("run") / "whole"
    launch(arguments(pictures, output, max_train_steps=8, checkpointing_steps=100))
    return output


def start(uninterrupted, output, *more, before="", **changes):
    """The script as a process, on the finished run's store; ``before`` is Python that runs ahead of it."""
    options = arguments(None, output, **{"max_train_steps": 8, "checkpointing_steps": 100, **changes})
    options += ["--latents_dir", str(uninterrupted / "latents"), "--resume_from_checkpoint", "latest", *more]
    code = f"import sys; sys.argv[0] = {SCRIPT[0]!r}\nimport train_sdxl_ambient as script\n{before}\nsys.exit(script.main())"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-u", "-c", code, *options], env=ENV, cwd=ROOT, **pipes)


# Told to stop in the middle of its third step.
SIGNAL = """
import os, signal
objective, calls = script.ambient_objective, []
def told(*arguments, **keywords):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return objective(*arguments, **keywords)
script.ambient_objective = told
"""
FAILING = SIGNAL.replace("os.kill(os.getpid(), signal.SIGTERM)", "raise RuntimeError('CUDA out of memory')")
# The loss of the step's first image is no number in steps 3 and 4.
NAN = """
objective, calls = script.ambient_objective, []
def broken(*arguments, **keywords):
    calls.append(1)
    losses = objective(*arguments, **keywords)
    if len(calls) in (3, 4):
        losses.ambient = losses.ambient * script.torch.tensor([float('nan')] + [1.0] * (len(losses.ambient) - 1))
        losses.total = losses.ambient.mean()
    return losses
script.ambient_objective = broken
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


def test_gradients_that_are_no_numbers_are_left_out_and_reported(uninterrupted, tmp_path):
    run = start(uninterrupted, tmp_path / "out", before=NAN)
    said, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors[-2000:]
    assert "step 3: left out" in said and "step 4: left out; so far 2 step(s)" in said
    progress = read_json(tmp_path / "out/checkpoint-8/checkpoint.json")["progress"]
    assert progress["skipped"]["steps"] == 2 and sum(progress["skipped"]["images"].values()) == 2
    lora, _, _ = states(tmp_path / "out/checkpoint-8")
    assert all(torch.isfinite(weight).all() for weight in lora.values())
    run = start(uninterrupted, tmp_path / "strict", "--max_skipped_steps", "1", before=NAN)
    said, errors = run.communicate(timeout=300)
    assert run.returncode == 2 and "2 of them in a row; lower --learning_rate" in errors
    assert "Saved step 3" in said


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
