"""The ambient loss: its two spaces, its draws, precision, and what it refuses. Its minimiser: tests/invariants."""

import pytest
import torch
from support.schedules import sdxl

from sdxl_ambient.levels import CLEAN
from sdxl_ambient.noise import PREDICTION_TYPES, NoiseSchedule
from sdxl_ambient.objective import CHOICES, ObjectiveOptions, ambient_loss, ambient_objective, snr_weight
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


def zero_terminal(prediction_type):
    """SDXL's betas rescaled to zero terminal SNR, in float64 by their definition (Lin et al. 2024, algorithm 1)."""
    roots = sdxl().alpha_bar(torch.arange(1000)).sqrt()
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return NoiseSchedule(roots.square(), prediction_type)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("level", [CLEAN, 0, 500, 998])
def test_x_n_space_at_zero_terminal_snr_is_the_error_of_the_clean_mean(prediction_type, level):
    """Closed form in float64: x_T has no signal, so E[x_n|x_T] = α_n x̂_0; and it is the limit of small signals."""
    schedule = zero_terminal(prediction_type)
    t_n, t = torch.tensor([level]), torch.tensor([999])
    x_n, xi, output = (torch.randn(1, 4, 3, 3, dtype=torch.float64) for _ in range(3))
    got = ambient_loss(lambda x, t: output, schedule, x_n, t_n, t, xi, "x_n")
    x_0 = -output if prediction_type == "v_prediction" else output  # α = 0, σ = 1
    want = (x_n - schedule.alpha(t_n) * x_0).square().mean((1, 2, 3))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    bars = schedule.alpha_bar(torch.arange(1000))
    bars[-1] = 1e-14
    near = ambient_loss(
        lambda x, t: output, NoiseSchedule(bars, prediction_type), x_n, t_n, t, xi, "x_n"
    )  # fmt: skip
    torch.testing.assert_close(near, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("space", LOSS_SPACES)
@pytest.mark.parametrize("weighting", ["none", "min_snr", "debiased", "balanced"])
def test_every_loss_and_its_gradient_is_finite_at_every_time(prediction_type, dtype, space, weighting):
    schedule = zero_terminal(prediction_type)
    t_n = torch.tensor([CLEAN, 0, 500, 998]).repeat_interleave(3)
    t = torch.stack([t_n[::3] + 1, (t_n[::3] + 1000) // 2, torch.full((4,), 999)], 1).flatten()
    x_n, xi = (torch.randn(12, 4, 3, 3, dtype=dtype) for _ in range(2))
    weight = torch.randn(4, 3, 3, dtype=dtype, requires_grad=True)
    loss = ambient_loss(lambda x, t: weight * x, schedule, x_n, t_n, t, xi, space)
    weighted = loss * snr_weight(schedule, t_n, t, weighting).to(loss)
    (gradient,) = torch.autograd.grad(weighted.sum(), weight)
    assert bool(torch.isfinite(weighted).all()) and bool(torch.isfinite(gradient).all())


def test_the_debiased_weight_at_zero_terminal_snr_is_the_limit_of_its_loss():
    """ν/r times the ε-space loss is r/ν times the error of E[x_n|x_t], which r → 0 takes to 0."""
    schedule = zero_terminal("v_prediction")
    t_n, t = torch.tensor([500, 500]), torch.tensor([998, 999])
    weight = snr_weight(schedule, t_n, t, "debiased")
    r, nu = schedule.transition(t_n, t)
    assert weight[0] == nu[0] / r[0] and weight[1] == 0


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
