"""The noise path of a picture: its law at every level and between levels, in closed form."""

import hashlib
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy import stats

from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.provenance import hash_bytes
from sdxl_ambient.store import observation
from sdxl_ambient.store.observation import bisection, draw_z, noise_to_signal

A, B, WHAT, OTHER = (hash_bytes(name) for name in (b"picture a", b"picture b", b"a latent", b"another latent"))
KEY = b"k" * 32
LEVELS = [0, 1, 2, 50, 99, 100, 101, 250, 300, 499, 500, 501, 700, 777, 900, 997, 998]


@pytest.fixture
def weights(monkeypatch):
    """draw_z with the unit vector of a node in place of its Gaussian numbers: what weight each node has, exactly."""

    def unit(seed, node, count):
        vector = torch.zeros(count, dtype=torch.float64)
        vector[node] = 1
        return vector

    monkeypatch.setattr(observation, "_normal", unit)
    return lambda schedule, t: draw_z(KEY, WHAT, A, schedule, t, (schedule.num_timesteps,))


@pytest.fixture(scope="module")
def zero_snr():
    """SDXL's schedule rescaled to zero terminal SNR, whose last level has no noise-to-signal ratio."""
    bars = torch.linspace(0.9991, 0, 1000, dtype=torch.float64)
    return NoiseSchedule(bars, "v_prediction")


@pytest.mark.parametrize("which", ["schedule", "zero_snr"])
def test_the_path_is_a_brownian_motion_exactly(weights, which, request):
    """Cov(W(v_s), W(v_t)) = min(v_s, v_t), between all levels: variance 1 of each z, √(v_s/v_t) between two of them."""
    schedule = request.getfixturevalue(which)
    v = torch.tensor(noise_to_signal(schedule), dtype=torch.float64)
    z = torch.stack([weights(schedule, t) for t in range(len(v))])
    want = torch.minimum(v[:, None], v) / (v[:, None] * v).sqrt()
    torch.testing.assert_close(z @ z.T, want, rtol=0, atol=1e-12)


def test_a_higher_level_is_the_lower_one_with_fresh_noise(weights, schedule):
    """x_t = r x_s + ν ξ: ξ has variance 1, and nothing in common with the noise of any level up to s."""
    for s, t in [(300, 500), (499, 500), (0, 998), (100, 101), (700, 998)]:
        low, high = torch.tensor([s]), torch.tensor([t])
        r, nu = schedule.transition(low, high)
        xi = (schedule.sigma(high) * weights(schedule, t) - r * schedule.sigma(low) * weights(schedule, s)) / nu
        assert float(xi @ xi) == pytest.approx(1, abs=1e-12)
        for below in [level for level in LEVELS if level <= s]:
            assert float(xi @ weights(schedule, below)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("variance", [0.01, 1.0, 100.0])
def test_two_levels_tell_what_the_lower_one_tells(weights, schedule, variance):
    """Gaussian x_0: its variance given x at 300 and at 500 is that given x at 300 alone. Independent noise tells more."""
    v = noise_to_signal(schedule)
    noise = torch.stack([math.sqrt(v[t]) * weights(schedule, t) for t in (300, 500)])
    ones = torch.ones(2, dtype=torch.float64)

    def posterior(covariance):
        return float(1 / (1 / variance + ones @ torch.linalg.solve(covariance, ones)))

    alone = 1 / (1 / variance + 1 / v[300])
    assert posterior(noise @ noise.T) == pytest.approx(alone, rel=1e-9)
    assert posterior(torch.diag(torch.tensor([v[300], v[500]], dtype=torch.float64))) < 0.999 * alone


def test_the_best_estimate_from_two_levels_is_no_better(schedule):
    """The same with numbers as they are drawn: regression of x_0 on both x has the error of the lower one's."""
    shape = (200_000,)
    x_0 = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = []
    for t in (300, 500):
        z, level = draw_z(KEY, WHAT, A, schedule, t, shape), torch.tensor([t])
        x.append(schedule.alpha(level) * x_0 + schedule.sigma(level) * z)
    both = torch.stack(x, 1)
    error = (x_0 - both @ torch.linalg.lstsq(both, x_0[:, None]).solution[:, 0]).var()
    assert float(error) == pytest.approx(1 - float(schedule.alpha_bar(torch.tensor([300]))), rel=0.02)
    anew = draw_z(b"K" * 32, WHAT, A, schedule, 500, shape)
    level = torch.tensor([500])
    both[:, 1] = schedule.alpha(level) * x_0 + schedule.sigma(level) * anew
    assert (x_0 - both @ torch.linalg.lstsq(both, x_0[:, None]).solution[:, 0]).var() < 0.9 * error


@pytest.mark.parametrize("t", LEVELS)
def test_z_is_standard_normal(schedule, t):
    z = draw_z(KEY, WHAT, A, schedule, t, (4, 64, 64)).flatten().numpy()
    assert z.dtype == np.float64 and np.isfinite(z).all() and len(np.unique(z)) == len(z)
    assert stats.kstest(z, "norm").pvalue > 1e-4
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 5 / math.sqrt(len(z))


def test_z_follows_from_key_picture_and_latent_alone(schedule):
    def z(*arguments):
        return draw_z(*arguments, schedule, 500, (4, 64, 64)).flatten()

    same = z(KEY, WHAT, A)
    assert torch.equal(same, z(KEY, WHAT, A))
    for other in (z(b"K" + KEY[1:], WHAT, A), z(KEY, OTHER, A), z(KEY, WHAT, B), z(KEY, A, WHAT)):
        assert abs(np.corrcoef(same, other)[0, 1]) < 5 / math.sqrt(len(same))


def test_two_keys_are_independent_at_all_levels(schedule):
    draws = [draw_z(bytes([k]) * 32, WHAT, A, schedule, t, (4, 64, 64)).flatten().numpy() for k in (1, 2) for t in LEVELS]
    between = np.corrcoef(draws)[: len(LEVELS), len(LEVELS) :]
    assert np.abs(between).max() < 5 / math.sqrt(len(draws[0]))


def test_numbers_have_the_law_of_the_quantile_function():
    """From 32 bits each, to the last digits; the ends of the range are finite and far out."""
    from sdxl_ambient.store.observation import _normal

    stream = hashlib.shake_256(b"seed" + (7).to_bytes(4, "little")).digest(4000)
    cells = [int.from_bytes(stream[i : i + 4], "little", signed=True) for i in range(0, 4000, 4)]
    want = [math.copysign(NormalDist().inv_cdf(0.5 - (abs(c + 0.5) / 2**32)), -(c + 0.5)) for c in cells]
    np.testing.assert_allclose(_normal(b"seed", 7, 1000), [-w for w in want], rtol=1e-9, atol=1e-12)
    far = NormalDist().inv_cdf(2.0**-33)
    assert -6.4 < far < -6.2


def test_z_is_the_same_on_every_machine(schedule):
    """A rebuild from a key years later must give the same noise: these numbers are for ever."""
    v = noise_to_signal(schedule)

    def normal(node):
        stream = hashlib.shake_256(bytes(64) + bytes([0x11] * 32) + node.to_bytes(4, "little")).digest(12)
        cells = [int.from_bytes(stream[i : i + 4], "little", signed=True) for i in (0, 4, 8)]
        return np.array([NormalDist().inv_cdf((c + 0.5) / 2**32 + 0.5) for c in cells])

    last = math.sqrt(v[999]) * normal(999)
    half = v[500] / v[999] * last + math.sqrt(v[500] * (v[999] - v[500]) / v[999]) * normal(500)
    z = draw_z(bytes(32), "00" * 32, "11" * 32, schedule, 500, (3,))
    np.testing.assert_allclose(z, half / math.sqrt(v[500]), rtol=1e-9)
    z = draw_z(bytes(32), "00" * 32, "11" * 32, schedule, 998, (3,))
    assert z.shape == (3,) and bool(torch.isfinite(z).all())


def test_bisection_reaches_every_level_in_twelve_draws():
    for level in range(999):
        steps = list(bisection(level, 999))
        assert steps[-1][1] == level and len(steps) <= 11
        assert all(a < m < b for a, m, b in steps)
        assert len(steps) <= 4 or level % 100
    assert not list(bisection(999, 999))
