"""Rates, memory and time left, against a clock that the test turns."""

import torch

from sdxl_ambient.training.progress import GIB, WINDOW, ProgressMeter


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_rates_and_time_left():
    clock = Clock()
    meter = ProgressMeter(16, steps=10, first=4, clock=clock)
    assert meter.images_per_second == 0 and meter.seconds_left == 0
    for _ in range(2):
        clock.now += 0.5
        meter.step()
    assert meter.seconds_per_step == 0.5 and meter.images_per_second == 32 and meter.seconds_left == 4 * 0.5


def test_validation_is_none_of_trainings_time():
    clock = Clock()
    meter = ProgressMeter(1, steps=3, clock=clock)
    clock.now += 1
    meter.step()
    with meter.pause():
        clock.now += 1000
    clock.now += 1
    meter.step()
    assert meter.seconds_per_step == 1


def test_the_rate_is_that_of_the_last_steps():
    clock = Clock()
    meter = ProgressMeter(1, steps=1000, clock=clock)
    for k in range(WINDOW + 20):
        clock.now += 10 if k < 20 else 1
        meter.step()
    assert meter.seconds_per_step == 1


def test_memory_is_this_process_on_a_cpu():
    kept = torch.ones(64 << 20)  # 256 MiB
    found = ProgressMeter(1, steps=1).scalars()
    assert 0.25 < found["peak_memory_gib"] < 64 and kept.numel()
    assert ProgressMeter(1, steps=1).postfix()["GiB"] == f"{found['peak_memory_gib']:.1f}"
    assert found["peak_memory_gib"] * GIB > kept.numel() * 4
