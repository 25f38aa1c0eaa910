"""The ambient loss: its two spaces, its draws, precision, and what it refuses. Its minimiser: tests/invariants."""

import pytest
import torch
from support.schedules import sdxl

from sdxl_ambient.levels import CLEAN
from sdxl_ambient.noise import PREDICTION_TYPES
from sdxl_ambient.objective import CHOICES, ObjectiveOptions, ambient_loss, ambient_objective
from sdxl_ambient.randomness import Randomness

LOSS_SPACES = CHOICES["loss_space"]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_x_n_space_is_the_error_of_the_expected_x_n(prediction_type):
    schedule = sdxl(prediction_type)
    t_n, t = torch.tensor([CLEAN, 0, 100, 500, 998]), torch.tensor([0, 1, 900, 501, 999])
    x_n, xi, output = (torch.randn(5, 4, 3, 3, dtype=torch.float64) for _ in range(3))
    x_t = schedule.renoise(x_n, t_n, t, xi)
    loss = {space: ambient_loss(lambda x, t: output, schedule, x_n, t_n, t, xi, space) for space in LOSS_SPACES}
    expected = schedule.expected_x_n(schedule.epsilon(output, x_t, t), x_t, t_n, t)
    want = (x_n - expected).square().mean((1, 2, 3))
    torch.testing.assert_close(loss["x_n"], want, rtol=1e-9, atol=1e-12)
    r, nu = schedule.transition(t_n, t)
    torch.testing.assert_close(loss["epsilon"] * (nu / r) ** 2, want, rtol=1e-9, atol=1e-12)


# -- draws --------------------------------------------------------------------------------------------------


def test_a_samples_draw_does_not_depend_on_its_batch():
    x_n, t_n = torch.randn(4, 4, 8, 8), torch.tensor([CLEAN, 100, 500, 900])

    def losses(which):
        generators = [torch.Generator().manual_seed(10 + i) for i in which]
        result = ambient_objective(lambda x_t, t: x_t.square(), sdxl(), x_n[which], t_n[which], generators)
        return result.t.tolist(), result.ambient.tolist()

    together = losses([0, 1, 2, 3])
    for order in ([2], [3, 0], [1, 3, 2]):
        t, ambient = losses(order)
        assert t == [together[0][i] for i in order] and ambient == [together[1][i] for i in order]


def test_times_are_drawn_above_each_level_and_all_of_them():
    t_n = torch.tensor([CLEAN, 500, 996]).repeat(500)
    t = ambient_objective(lambda x, t: x, sdxl(), torch.zeros(1500, 1), t_n, torch.Generator().manual_seed(0)).t
    assert bool((t > t_n).all())
    assert set(t[2::3].tolist()) == {997, 998, 999}
    assert 480 < t[0::3].double().mean() < 520 and 740 < t[1::3].double().mean() < 760


def test_noise_is_standard_normal_and_fresh():
    x = torch.zeros(8, 4, 16, 16)
    randomness = Randomness(torch.Generator().manual_seed(0), 8)
    a, b = randomness.normal(x), randomness.normal(x)
    for xi in (a, b):
        assert abs(xi.mean()) < 0.03 and abs(xi.std() - 1) < 0.03
    assert abs((a * b).mean()) < 0.03


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_data_and_output_give_a_float32_loss(dtype):
    x_n, xi = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    t_n, t = torch.tensor([500, 998]), torch.tensor([501, 999])
    full = ambient_loss(lambda x_t, t: x_t, sdxl(), x_n.to(dtype).float(), t_n, t, xi)
    half = ambient_loss(lambda x_t, t: x_t.to(dtype), sdxl(), x_n.to(dtype), t_n, t, xi)
    assert half.dtype == torch.float32 and bool(torch.isfinite(half).all())
    torch.testing.assert_close(half, full, rtol=1e-2, atol=0)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="loss_space: 'pixels' is not one of epsilon, x_n"):
        ObjectiveOptions(loss_space="pixels")
    with pytest.raises(ValueError, match="1 generators for 2 samples"):
        Randomness([torch.Generator()], 2)
    with pytest.raises(ValueError, match="must lie between"):
        ambient_objective(lambda x, t: x, sdxl(), torch.zeros(1, 1), torch.tensor([999]), torch.Generator())
