"""The consistency loss, SNR weights and restored samples, against closed forms on linear-Gaussian models."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from support.schedules import SDXL, sdxl

from sdxl_ambient.levels import CLEAN
from sdxl_ambient.noise import PREDICTION_TYPES
from sdxl_ambient.objective import (
    Anchor,
    ExtraRows,
    ObjectiveOptions,
    ambient_loss,
    ambient_objective,
    consistency_loss,
    draw_times,
    snr_weight,
)
from sdxl_ambient.posterior import ancestral_steps, posterior_mean, sample_posterior, spaced_times
from sdxl_ambient.randomness import Randomness

MEAN = torch.tensor([0.7, -1.2], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.8, 0.3], [0.3, 0.25]], dtype=torch.float64)


def times(*values):
    return torch.tensor(values)


def generators(count, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def exact_denoiser(schedule):
    """The network output that belongs to E[ε|x_t] of N(MEAN, COVARIANCE), for whatever the schedule's network predicts."""

    def denoise(x_t, t):
        alpha, sigma = (f(t)[:, None, None] for f in (schedule.alpha, schedule.sigma))
        total = alpha**2 * COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64)
        residual = x_t - alpha[:, 0] * MEAN
        epsilon = (sigma * torch.linalg.solve(total, residual[..., None]))[..., 0]
        x_0 = (x_t - sigma[:, 0] * epsilon) / alpha[:, 0]
        return {
            "epsilon": epsilon,
            "sample": x_0,
            "v_prediction": alpha[:, 0] * epsilon - sigma[:, 0] * x_0,
        }[schedule.prediction_type]

    return denoise


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_true_model_is_consistent(prediction_type):
    """On Gaussian data h is linear, so one reverse step of any length keeps E[h(x_s, s)|x_a] = h(x_a, a) exactly."""
    schedule = sdxl(prediction_type)
    denoise = exact_denoiser(schedule)
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, s = times(1, 50, 100, 500, 999, 999), times(0, 0, 99, 250, 998, 0)
    anchor = posterior_mean(denoise, schedule, x, a)
    mean = schedule.reverse_step(x, anchor, a, s, torch.zeros_like(x))
    torch.testing.assert_close(posterior_mean(denoise, schedule, mean, s), anchor, rtol=1e-8, atol=1e-8)


def test_single_estimator_pays_one_graph_and_reuses_the_ambient_forward():
    calls = []

    def denoise(x_t, t):
        calls.append(torch.is_grad_enabled())
        return x_t * 0.5

    x_n, t_n = torch.randn(4, 3), times(100, 100, 300, CLEAN)
    for estimator, anchor, expected in (
        ("single", "ambient", [True, True, False]),
        ("both", "ambient", [True, True, True]),
        ("single", "boundary", [True, True, True, False]),
        ("single", "chain", [True, False, False, False, True, True, False]),
    ):
        calls.clear()
        options = ObjectiveOptions(
            consistency_weight=1, consistency_estimator=estimator, consistency_anchor=anchor, consistency_steps=3
        )
        ambient_objective(denoise, sdxl(), x_n, t_n, generators(4), options)
        assert calls == expected, (estimator, anchor)


@pytest.mark.parametrize("anchor", ["ambient", "boundary", "chain"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_samples_consistency_does_not_depend_on_its_batch(anchor, prediction_type):
    x_n, t_n = torch.randn(4, 4, 8, 8), times(CLEAN, 1, 500, 900)
    options = ObjectiveOptions(consistency_weight=1.0, consistency_anchor=anchor)

    def losses(which):
        randomness = [torch.Generator().manual_seed(10 + i) for i in which]
        result = ambient_objective(lambda x, t: x.sin(), sdxl(prediction_type), x_n[which], t_n[which], randomness, options)
        return result.consistency

    together = losses([0, 1, 2, 3])
    assert bool(torch.isfinite(together).all()) and bool((together[1:] != 0).all())
    if anchor != "ambient":  # clean data have nothing below their own level
        assert together[0] == 0
    for order in ([2], [3, 0], [1, 3, 2]):
        torch.testing.assert_close(losses(order), together[order], rtol=1e-5, atol=1e-6)


def test_consistency_weight_zero_is_the_ambient_loss_alone_and_the_parts_add_up():
    x_n, t_n = torch.randn(6, 3), times(100, 100, 300, CLEAN, 0, 998)
    plain = ambient_objective(lambda x, t: x.sin(), sdxl(), x_n, t_n, generators(6))
    options = ObjectiveOptions(consistency_weight=0.3, consistency_batch=2)
    both = ambient_objective(lambda x, t: x.sin(), sdxl(), x_n, t_n, generators(6), options)
    assert plain.consistency is None and len(both.consistency) == 2
    assert torch.equal(plain.ambient, both.ambient) and torch.equal(plain.t, both.t)
    torch.testing.assert_close(both.total, plain.total + 0.3 * both.consistency.mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_finite_for_every_pair_of_the_schedule(dtype, prediction_type):
    """Every (a, s) with a − s ≤ 3 or s = 0, output in half precision, gradients included; and every (t_n, t) likewise."""
    schedule = sdxl(prediction_type)
    a = torch.arange(1, 1000).repeat(4)
    s = torch.cat([torch.arange(1, 1000) - k for k in (1, 2, 3)] + [torch.zeros(999, dtype=torch.int64)]).clamp(min=0)
    weight = torch.ones((), requires_grad=True)

    def denoise(x_t, t):
        return (weight * x_t).to(dtype)

    x = torch.randn(len(a), 4, generator=torch.Generator().manual_seed(0))
    for space in ("x_0", "snr"):
        randomness = Randomness(torch.Generator().manual_seed(0), len(a))
        anchor = posterior_mean(denoise, schedule, x, a)
        options = ObjectiveOptions(consistency_space=space)
        values = consistency_loss(denoise, schedule, Anchor(x, a, anchor), s, randomness, options)
        assert values.dtype == torch.float32 and bool(torch.isfinite(values).all())
        (gradient,) = torch.autograd.grad(values.sum(), weight)
        assert bool(torch.isfinite(gradient))
    for weighting in ("none", "min_snr", "debiased"):
        t_n, t = s - 1, a
        loss = ambient_loss(denoise, schedule, x, t_n, t, torch.randn_like(x))
        weighted = loss * snr_weight(schedule, t_n, t, weighting).to(loss)
        assert bool(torch.isfinite(weighted).all()) and bool(torch.isfinite(torch.autograd.grad(weighted.sum(), weight)[0]))


# -- weights and times ----------------------------------------------------------------------


def test_snr_weights_are_the_published_ones_on_clean_data_and_those_of_the_transition_else():
    schedule, t = sdxl(), torch.arange(1000)
    clean = torch.full_like(t, CLEAN)
    snr = compute_snr(DDPMScheduler(**SDXL), t).double()
    torch.testing.assert_close(snr_weight(schedule, clean, t, "min_snr", 5.0), snr.clamp(max=5) / snr, rtol=1e-4, atol=0)
    torch.testing.assert_close(snr_weight(schedule, clean, t, "debiased"), snr.rsqrt(), rtol=1e-4, atol=0)
    assert snr_weight(schedule, clean, t, "none").eq(1).all()
    t_n, t = times(100, 500), times(400, 501)
    ratio = schedule.alpha_bar(t) / schedule.alpha_bar(t_n)
    ratio = ratio / (1 - ratio)  # r²/ν²
    torch.testing.assert_close(snr_weight(schedule, t_n, t, "min_snr", 5.0), ratio.clamp(max=5) / ratio)
    torch.testing.assert_close(snr_weight(schedule, t_n, t, "debiased"), ratio.rsqrt())
    assert not snr_weight(schedule, t, t, "min_snr").any() and not snr_weight(schedule, t, t, "debiased").any()


def test_balanced_weights_undo_the_ambient_scale_up_to_the_cap():
    schedule, t_n, t = sdxl(), times(100, 100, 100, CLEAN, CLEAN), times(100, 101, 800, 0, 800)
    weight = snr_weight(schedule, t_n, t, "balanced", cap=25.0)
    assert weight[:2].tolist() == [25, 25] and weight[3:].tolist() == [1, 1]
    torch.testing.assert_close(weight[2] * schedule.ambient_scale(t_n, t)[2] ** 2, torch.tensor(1.0, dtype=torch.float64))
    # With it an error of ε̂ weighs the same at every level where the cap isn't reached.
    far = times(400, 700, 999)
    level = torch.full_like(far, 100)
    effect = schedule.ambient_scale(level, far) ** 2 * snr_weight(schedule, level, far, "balanced")
    torch.testing.assert_close(effect, torch.ones_like(effect))


def test_antithetic_pairs_have_opposite_noise_and_the_mean_of_their_losses():
    schedule, x_n, t_n = sdxl(), torch.randn(3, 4, 8, 8), times(100, 500, CLEAN)
    x_0, t_max, seen = torch.randn(2, 4, 8, 8), times(500, 30), []

    def denoise(x_t, t):
        seen.append((x_t, t))
        return x_t.sin()

    options = ObjectiveOptions(antithetic=True, weighting="balanced", consistency_weight=0.5)
    restored = ExtraRows(x_0, t_max)
    losses = ambient_objective(denoise, schedule, x_n, t_n, generators(5), options, restored)
    (x_t, t), both = seen[0], torch.cat([x_n, x_0])
    levels = torch.cat([t_n, times(CLEAN, CLEAN)])
    assert torch.equal(t[:5], t[5:]) and len(seen[1][0]) == 3  # consistency pairs start at the first of the two
    middle = schedule.renoise(both, levels, t[:5], torch.zeros_like(both))
    torch.testing.assert_close((x_t[:5] + x_t[5:]) / 2, middle)
    _, nu = schedule.transition(levels, t[:5])
    xi = (x_t[:5] - middle) / nu[:, None, None, None].float()
    each = [ambient_loss(lambda x, t: x.sin(), schedule, both, levels, t[:5], sign * xi) for sign in (1, -1)]
    want = (each[0] + each[1]) / 2
    torch.testing.assert_close(torch.cat([losses.ambient, losses.extra]), want, rtol=1e-4, atol=1e-5)
    weighted = want * snr_weight(schedule, levels, t[:5], "balanced").float()
    total = weighted[:3].mean() + weighted[3:].mean() + 0.5 * losses.consistency.mean()
    torch.testing.assert_close(losses.total, total, rtol=1e-4, atol=1e-5)


def test_antithetic_pairs_keep_the_gradient_and_lose_its_noise_next_to_t_n():
    """For ε̂ = W x the pair's gradient is, in closed form, 2 c (c W (r² x_n x_nᵀ + ν² ξ ξᵀ) − ν ξ ξᵀ) / d, c = ν/σ_t: the
    terms ξ x_nᵀ, of size one as ν → 0 beside c → 0, are gone."""
    schedule, generator = sdxl(), torch.Generator().manual_seed(0)
    x_n = torch.randn(500, 2, dtype=torch.float64, generator=generator) + 1
    t_n = torch.full((500,), 100)
    spread = {}
    for antithetic in (False, True):
        W = torch.tensor([[0.5, -0.2], [0.1, 0.7]], dtype=torch.float64, requires_grad=True)
        seen, rows = [], []

        def denoise(x_t, t, W=W, seen=seen):
            seen.append((x_t, t))
            return x_t @ W.T

        for i in range(500):
            one = ambient_objective(denoise, schedule, x_n[i : i + 1], t_n[:1], generators(1, i),
                                    ObjectiveOptions(antithetic=antithetic, t_sampling="near"))  # fmt: skip
            if not 101 <= int(one.t) <= 104:
                continue
            rows.append(torch.autograd.grad(one.total, W)[0])
            if antithetic:
                r, nu = schedule.transition(t_n[:1], one.t)
                c, x = nu / schedule.sigma(one.t), x_n[i]
                xi = (seen[-1][0][0] - r * x) / nu
                outer = nu**2 * torch.outer(xi, xi)
                want = c * (c * W @ (r**2 * torch.outer(x, x) + outer) - outer / nu)
                torch.testing.assert_close(rows[-1], want.detach(), rtol=1e-9, atol=1e-12)
        spread[antithetic] = torch.stack(rows).std(0).mean()
    assert len(rows) > 30 and spread[True] < 0.2 * spread[False]


def test_near_sampling_draws_half_of_the_times_close_above_t_n():
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t_n = torch.full((100_000,), 100)
    t = draw_times(sdxl(), t_n, u, "near")
    assert t.min() == 101 and t.max() == 999
    # Half of them follow u³: below 1/8 of the range lie half of those, and an eighth of the uniform half.
    assert ((t - 101) < 899 / 8).double().mean() == pytest.approx(0.5 * 0.5 + 0.5 / 8, abs=0.002)
    assert torch.equal(draw_times(sdxl(), t_n, u, "uniform"), sdxl().draw_times(t_n, u))


# -- restored samples ----------------------------------------------------------------------


def test_restored_samples_have_the_plain_loss_at_their_own_levels():
    schedule, x_n, x_0 = sdxl(), torch.randn(2, 4, 8, 8), torch.randn(3, 4, 8, 8)
    t_n, t_max = times(500, 100), times(500, 100, 0)
    seen = []

    def denoise(x_t, t):
        seen.append((x_t, t))
        return x_t.sin()

    options = ObjectiveOptions(restore_weight=0.7, t_sampling="near", loss_space="x_n")
    losses = ambient_objective(denoise, schedule, x_n, t_n, generators(5), options, ExtraRows(x_0, t_max))
    assert len(seen) == 1 and len(losses.ambient) == 2 and len(losses.extra) == 3
    x_t, t = seen[0]
    assert bool((t[2:] <= t_max).all()) and bool((t[:2] > t_n).all()) and t[4] == 0
    torch.testing.assert_close(losses.total, losses.ambient.mean() + 0.7 * losses.extra.mean())
    for i, generator in enumerate(generators(5)[2:]):
        randomness = Randomness([generator], 1)
        u, xi = randomness.uniform(), randomness.normal(x_0[:1])
        alone = ambient_loss(lambda x, t: x.sin(), schedule, x_0[i : i + 1], times(CLEAN), t[2 + i : 3 + i], xi, "x_n")
        torch.testing.assert_close(alone[0], losses.extra[i])
        assert t[2 + i] == int(u * (t_max[i] + 1))
    plain = ambient_objective(lambda x, t: x.sin(), schedule, x_n, t_n, generators(2), ObjectiveOptions(t_sampling="near"))
    assert torch.equal(plain.t, losses.t)


def test_chains_of_the_true_model_draw_from_the_posterior():
    """From x_n, x̃_0 has the mean and covariance of the Gaussian posterior; a fine chain needs ~1 % of slack."""
    schedule, many = sdxl(), 20_000
    denoise = exact_denoiser(schedule)
    x_n = torch.tensor([0.9, -0.3], dtype=torch.float64).expand(many, 2)
    t_n = times(300).expand(many)
    found = sample_posterior(denoise, schedule, x_n, t_n, 150, Randomness(torch.Generator().manual_seed(0), many))
    bar = schedule.alpha_bar(times(300))
    gain = bar.sqrt() * COVARIANCE @ torch.linalg.inv(bar * COVARIANCE + (1 - bar) * torch.eye(2, dtype=torch.float64))
    want_mean = MEAN + gain @ (x_n[0] - bar.sqrt() * MEAN)
    want_cov = COVARIANCE - bar.sqrt() * gain @ COVARIANCE
    torch.testing.assert_close(found.mean(0), want_mean, atol=0.01, rtol=0)
    torch.testing.assert_close(found.T.cov(), want_cov, atol=0.01, rtol=0)


def test_walks_have_the_given_times_and_steps_of_no_length_change_nothing():
    assert spaced_times(times(100, 7), times(0, 7), 4).tolist() == [[100, 7], [75, 7], [50, 7], [25, 7], [0, 7]]
    assert spaced_times(times(100), times(0), 4, power=2).flatten().tolist() == [100, 56, 25, 6, 0]
    x = torch.randn(2, 4)
    stay = ancestral_steps(lambda x, t: x.sin(), sdxl(), x, times(0, 300).expand(3, 2), Randomness(None, 2))
    torch.testing.assert_close(stay, x)
    grow, falling = lambda x, t: x * torch.ones((), requires_grad=True), times(300, 10)[:, None].expand(2, 2)
    grown = ancestral_steps(grow, sdxl(), x, falling, Randomness(None, 2))
    assert not grown.requires_grad and bool(torch.isfinite(grown).all())


def test_wrong_options_are_named():
    wrong = dict(weighting="snr", consistency_anchor="x", consistency_max_step=0, balance_cap=0.5)
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name}: '?{value}'? is not"):
            ObjectiveOptions(**{name: value})
