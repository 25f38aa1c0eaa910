"""A run that is told to stop, fails or meets numbers that are none goes on where it was, to the same weights."""

import os
import signal

import pytest
import torch

from sdxl_ambient.training.interruption import Interrupted, Interruption, Rescue, Skipped, not_finite, overflowed


def test_the_first_signal_is_noted_and_the_second_ends_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with Interruption() as interruption:
        assert interruption.reason is None and interruption.exit_code == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.reason == "SIGTERM" and interruption.exit_code == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_work_before_the_first_step_can_be_told_to_stop():
    with Interruption() as interruption:
        interruption.check()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match="SIGINT"):
            interruption.check()


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


def test_only_overflows_are_left_to_float16s_gradient_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    assert overflowed(scaler, broken=False) and not overflowed(scaler, broken=True) and not overflowed(None, broken=False)
    # A scale of 1 changes no gradient: it can't be what is too high.
    assert not overflowed(torch.amp.GradScaler("cpu", init_scale=1.0), broken=False)


class One:
    num_processes = 1

    def print(self, text):
        self.said = text


@pytest.mark.parametrize(
    ("whole", "processes", "common", "saved"),
    [(True, 1, (), [3]), (False, 1, (), []), (True, 2, (), []), (True, 2, RuntimeError, [3]), (True, 2, OSError, [])],
)
def test_the_last_whole_step_is_saved_with_its_random_state_before_an_error_leaves(whole, processes, common, saved):
    accelerator, done = One(), []
    accelerator.num_processes = processes
    with (
        pytest.raises(RuntimeError, match="no memory"),
        Rescue(accelerator, lambda s: done.append((s, torch.rand(1))), 0, common) as rescue,
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
