"""The algebra of noise levels against closed forms, and against diffusers' own schedule."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler

from sdxl_ambient.levels import CLEAN
from sdxl_ambient.noise import PREDICTION_TYPES, NoiseSchedule, levels

SDXL = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.fixture(scope="module")
def sdxl():
    return NoiseSchedule.from_scheduler(DDPMScheduler(**SDXL))


def exact_bars() -> np.ndarray:
    """ᾱ of SDXL's schedule from its definition, in float64."""
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def times(*values) -> torch.Tensor:
    return torch.tensor(values)


def test_schedule_is_the_schedulers_own(sdxl, schedule, miniature):
    t = torch.arange(1000)
    bars = sdxl.alpha_bar(t)
    assert bars.dtype == torch.float64
    np.testing.assert_allclose(bars, exact_bars(), rtol=2e-5)
    np.testing.assert_allclose(sdxl.alpha(t), np.sqrt(exact_bars()), rtol=1e-5)
    assert torch.equal(bars, DDPMScheduler(**SDXL).alphas_cumprod.double())
    # The shipped miniature has SDXL's schedule, whichever scheduler class reads it.
    assert torch.equal(bars, schedule.alpha_bar(t))
    euler = EulerDiscreteScheduler.from_pretrained(miniature, subfolder="scheduler")
    assert torch.equal(bars, NoiseSchedule.from_scheduler(euler).alpha_bar(t))
    assert (sdxl.alpha(t) ** 2 + sdxl.sigma(t) ** 2 - 1).abs().max() < 1e-15
    torch.testing.assert_close(sdxl.snr(t), bars / (1 - bars))


def test_clean_is_no_noise(sdxl):
    t = times(CLEAN, CLEAN)
    assert sdxl.alpha(t).tolist() == [1, 1] and sdxl.sigma(t).tolist() == [0, 0]
    x, z = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    assert torch.equal(sdxl.observe(x, t, z), x)
    assert sdxl.ambient_scale(t, times(0, 999)).tolist() == [1, 1]


def test_levels_spells_none_ints_and_tensors_alike():
    assert levels(None, 3).tolist() == [CLEAN] * 3
    assert levels(500, 2).tolist() == [500, 500]
    assert levels(torch.tensor([1, -1], dtype=torch.int32), 2).dtype == torch.int64
    with pytest.raises(ValueError, match=r"shape \(3,\), one level per sample is \(2,\)"):
        levels(torch.zeros(3), 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_samples_keep_float32_coefficients(sdxl, dtype):
    """σ_0 of SDXL is 0.029: in bfloat16 it would be off by 0.4 %."""
    for t in (0, 50):
        ones, zeros = torch.ones(1, 1, 1, 1, dtype=dtype), torch.zeros(1, 1, 1, 1, dtype=dtype)
        alpha, sigma = np.sqrt(exact_bars()[t]), np.sqrt(1 - exact_bars()[t])
        assert sdxl.observe(zeros, times(t), ones).item() == pytest.approx(sigma, abs=1e-6)
        assert sdxl.observe(ones, times(t), zeros).item() == pytest.approx(alpha, abs=1e-6)
        assert sdxl.renoise(zeros, times(CLEAN), times(t), ones).item() == pytest.approx(sigma, abs=1e-6)
        assert sdxl.x_0(ones, zeros, times(t)).item() == pytest.approx(-sigma / alpha, abs=1e-6)
    r = np.sqrt(exact_bars()[501] / exact_bars()[500])
    nu = np.sqrt(1 - exact_bars()[501] / exact_bars()[500])
    assert sdxl.renoise(zeros, times(500), times(501), ones).item() == pytest.approx(nu, abs=1e-6)
    assert sdxl.renoise(ones, times(500), times(501), zeros).item() == pytest.approx(r, abs=1e-6)


def test_every_pair_of_levels_is_finite_and_safe(sdxl):
    """ν/σ_t ≤ 1 for every (t_n, t): the objective divides by nothing small, so it holds in half precision."""
    t_n, t = torch.triu_indices(1001, 1001, offset=1)
    t_n, t = t_n - 1, t - 1  # from clean
    scale = sdxl.ambient_scale(t_n, t)
    r, nu = sdxl.transition(t_n, t)
    assert bool(torch.isfinite(scale).all()) and float(scale.min()) > 0 and float(scale.max()) <= 1
    assert bool(torch.isfinite(r).all()) and float(r.min()) > 0 and float(r.max()) < 1
    assert float(nu.min()) > 0.02 and float(scale.half().min()) > 0
    assert (r**2 + nu**2 - 1).abs().max() < 1e-14
    # Both ways round σ_t² = r² σ_n² + ν².
    assert (r**2 * sdxl.sigma(t_n) ** 2 + nu**2 - sdxl.sigma(t) ** 2).abs().max() < 1e-14
    same = torch.arange(1000)
    assert float(sdxl.ambient_scale(same, same).abs().max()) == 0


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conversions_round_trip(prediction_type, dtype):
    scheduler = DDPMScheduler(**SDXL, prediction_type=prediction_type)
    schedule = NoiseSchedule.from_scheduler(scheduler)
    generator = torch.Generator().manual_seed(0)
    x_0, epsilon = (torch.randn(5, 4, 3, 3, generator=generator, dtype=dtype) for _ in range(2))
    t = times(0, 1, 50, 500, 999)
    x_t = schedule.observe(x_0, t, epsilon)
    output = {
        "epsilon": epsilon, "v_prediction": scheduler.get_velocity(x_0, epsilon, t), "sample": x_0
    }[prediction_type]  # fmt: skip
    # σ_0/α_0 = 0.03, σ_999/α_999 = 15: float32's error grows by as much.
    tolerance = dict(rtol=1e-6, atol=1e-6) if dtype == torch.float64 else dict(rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(schedule.epsilon(output, x_t, t), epsilon, **tolerance)
    torch.testing.assert_close(schedule.denoised(output, x_t, t), x_0, **tolerance)
    torch.testing.assert_close(schedule.x_0(epsilon, x_t, t), x_0, **tolerance)


def test_forward_process_is_diffusers_add_noise_bit_for_bit(sdxl):
    x_0, noise, t = torch.randn(1000, 4, 8, 8), torch.randn(1000, 4, 8, 8), torch.arange(1000)
    want = DDPMScheduler(**SDXL).add_noise(x_0, noise, t)
    assert torch.equal(sdxl.observe(x_0, t, noise), want)
    assert torch.equal(sdxl.renoise(x_0, torch.full((1000,), CLEAN), t, noise), want)


def test_renoising_has_the_marginals_of_x_t(sdxl):
    """The coefficients of x_0 and the variance of the two noises together are those of x_t given x_0."""
    t_n, t = times(CLEAN, 0, 100, 500, 998), times(3, 1, 900, 501, 999)
    one, zero = torch.ones(5, 1, dtype=torch.float64), torch.zeros(5, 1, dtype=torch.float64)

    def x_t(x_0, z, xi):
        return sdxl.renoise(sdxl.observe(x_0, t_n, z), t_n, t, xi)[:, 0]

    torch.testing.assert_close(x_t(one, zero, zero), sdxl.alpha(t), rtol=1e-12, atol=0)
    variance = x_t(zero, one, zero) ** 2 + x_t(zero, zero, one) ** 2
    torch.testing.assert_close(variance, sdxl.sigma(t) ** 2, rtol=1e-12, atol=0)


def test_reverse_step_is_the_gaussian_posterior(sdxl):
    """x_s given x_t and x_0, by conditioning the joint Gaussian of (x_s, x_t) given x_0."""
    t, s = times(999, 500, 500, 10, 1), times(998, 499, 20, 3, 0)
    alpha_s, var_s, var_t = sdxl.alpha(s), sdxl.sigma(s) ** 2, sdxl.sigma(t) ** 2
    r = sdxl.alpha(t) / alpha_s
    covariance = r * var_s  # of x_s and x_t
    x_t, x_0 = torch.randn(5, 1, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    zero, one = torch.zeros_like(x_t), torch.ones_like(x_t)
    mean = alpha_s * x_0[:, 0] + covariance / var_t * (x_t[:, 0] - sdxl.alpha(t) * x_0[:, 0])
    std = (var_s - covariance**2 / var_t).sqrt()
    torch.testing.assert_close(sdxl.reverse_step(x_t, x_0, t, s, zero)[:, 0], mean, rtol=1e-9, atol=1e-9)
    spread = sdxl.reverse_step(zero, zero, t, s, one)[:, 0]
    torch.testing.assert_close(spread, std, rtol=1e-8, atol=1e-9)


def test_reverse_steps_compose(sdxl):
    """With the true x_0, t → u → s has the mean and variance of t → s."""
    t, u, s = times(900, 700), times(600, 699), times(100, 0)
    x_t, x_0 = torch.randn(2, 1, dtype=torch.float64), torch.randn(2, 1, dtype=torch.float64)
    zero, one = torch.zeros_like(x_t), torch.ones_like(x_t)

    def chain(x_t, x_0, z_u, z_s):
        return sdxl.reverse_step(sdxl.reverse_step(x_t, x_0, t, u, z_u), x_0, u, s, z_s)

    want = sdxl.reverse_step(x_t, x_0, t, s, zero)
    torch.testing.assert_close(chain(x_t, x_0, zero, zero), want, rtol=1e-10, atol=1e-10)
    variance = chain(zero, zero, one, zero) ** 2 + chain(zero, zero, zero, one) ** 2
    torch.testing.assert_close(variance, sdxl.reverse_step(zero, zero, t, s, one) ** 2, rtol=1e-10, atol=1e-12)


def test_reverse_step_keeps_the_marginal(sdxl):
    """Where x_t is distributed as the forward process says, so is x_s."""
    t, s = times(900, 30), times(200, 29)
    one, zero = torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    mean = sdxl.reverse_step(sdxl.observe(one, t, zero), one, t, s, zero)[:, 0]
    torch.testing.assert_close(mean, sdxl.alpha(s), rtol=1e-9, atol=1e-9)
    variance = sdxl.reverse_step(sdxl.observe(zero, t, one), zero, t, s, zero) ** 2
    variance = (variance + sdxl.reverse_step(zero, zero, t, s, one) ** 2)[:, 0]
    torch.testing.assert_close(variance, sdxl.sigma(s) ** 2, rtol=1e-8, atol=1e-9)


def test_reverse_step_to_clean_is_x_0(sdxl):
    x_t, x_0, z = (torch.randn(3, 4, dtype=torch.float64) for _ in range(3))
    got = sdxl.reverse_step(x_t, x_0, times(0, 500, 999), torch.full((3,), CLEAN), z)
    torch.testing.assert_close(got, x_0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t_n", [CLEAN, 0, 500, 996, 998])
def test_times_drawn_cover_exactly_the_levels_above_t_n_uniformly(sdxl, t_n):
    count = 999 - t_n
    middle = (torch.arange(10 * count, dtype=torch.float64) + 0.5) / (10 * count)
    t = sdxl.draw_times(torch.full((10 * count,), t_n), middle)
    values, counts = t.unique(return_counts=True)
    assert values.tolist() == list(range(t_n + 1, 1000))
    assert set(counts.tolist()) == {10}
    ends = torch.tensor([0.0, np.nextafter(1.0, 0)], dtype=torch.float64)
    assert sdxl.draw_times(torch.full((2,), t_n), ends).tolist() == [t_n + 1, 999]


def test_times_respect_each_samples_own_level(sdxl):
    t_n = times(CLEAN, 998, 500).repeat(2000)
    t = sdxl.draw_times(t_n, torch.rand(6000, dtype=torch.float64))
    assert bool((t > t_n).all()) and int(t.max()) == 999
    assert int(t[0::3].min()) < 10 and int(t[2::3].min()) < 510


@pytest.mark.parametrize("t_n", [999, 1000, -2])
def test_levels_without_a_time_above_are_refused(sdxl, t_n):
    with pytest.raises(ValueError, match=r"must lie between -1 \(clean\) and 998"):
        sdxl.draw_times(times(t_n), torch.rand(1))


def test_bad_times_are_refused(sdxl):
    x = torch.zeros(1, 1)
    for t in (1000, -2):
        with pytest.raises(ValueError, match=rf"times \[{t}\] must lie between -1 \(clean\) and 999"):
            sdxl.alpha(times(t))
    with pytest.raises(ValueError, match="whole numbers, not torch.float32"):
        sdxl.sigma(torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"times \[499\] are not all at or above the data's levels \[500\]"):
        sdxl.renoise(x, times(500), times(499), x)
    with pytest.raises(ValueError, match="not all at or above"):
        sdxl.reverse_step(x, x, times(3), times(4), x)


@pytest.mark.parametrize(
    ("bars", "prediction_type", "message"),
    [
        ([0.9, 0.5, 0.0], "epsilon", "zero terminal SNR"),
        ([0.5, 0.9], "epsilon", "decrease strictly"),
        ([1.5, 0.9], "epsilon", "decrease strictly"),
        ([0.9, float("nan")], "epsilon", "finite"),
        ([0.9, 0.5], "noise", "'noise' is not one of epsilon, v_prediction, sample"),
    ],
)
def test_bad_schedules_are_refused(bars, prediction_type, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(torch.tensor(bars), prediction_type)


def test_zero_terminal_snr_is_fine_for_v_prediction():
    schedule = NoiseSchedule(torch.tensor([0.9, 0.5, 0.0]), "v_prediction")
    x_0, xi = torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    x_t = schedule.renoise(x_0, times(CLEAN), times(2), xi)
    assert torch.equal(x_t, xi)
    assert torch.equal(schedule.denoised(-x_0, x_t, times(2)), x_0)  # v = −x_0 there
