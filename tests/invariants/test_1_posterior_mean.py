"""Invariant 1: on Gaussian and mixture data the minimiser of the ambient loss is the closed-form posterior mean."""

import math

import pytest
import torch
from support.gaussian import Gaussian
from support.schedules import sdxl

from sdxl_ambient.levels import CLEAN
from sdxl_ambient.noise import PREDICTION_TYPES
from sdxl_ambient.objective import CHOICES, ambient_loss

LOSS_SPACES = CHOICES["loss_space"]
PAIRS = [(CLEAN, 0), (CLEAN, 700), (0, 1), (100, 101), (100, 800), (500, 501), (500, 999), (998, 999)]


def minimise_linear(loss):
    """The parameters that minimise a quadratic ``loss(weights (2, 2), bias (2,))``, solved exactly."""

    def flat(theta):
        return loss(theta[:4].reshape(2, 2), theta[4:])

    zero = torch.zeros(6, dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(flat, zero)
    hessian = torch.autograd.functional.hessian(flat, zero)
    theta = torch.linalg.solve(hessian, -gradient)
    return theta[:4].reshape(2, 2), theta[4:]


@pytest.mark.parametrize("loss_space", LOSS_SPACES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("t_n", "t"), PAIRS)
def test_gaussian_minimiser_is_the_posterior_mean(t_n, t, prediction_type, loss_space):
    check_gaussian(sdxl(prediction_type), torch.full((64,), t_n), t, loss_space)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_gaussian_minimiser_with_a_level_per_sample(prediction_type):
    """Clean, lightly and heavily noisy samples in one batch pull the model to the same minimiser."""
    levels = torch.tensor([CLEAN, 100, 400, 698])
    check_gaussian(sdxl(prediction_type), levels.repeat_interleave(64), 700, "epsilon")


def check_gaussian(schedule, t_n, t, loss_space):
    data = Gaussian()
    x_0, z, xi = (p.repeat(len(t_n) // 64, 1) for p in data.points())
    x_n = schedule.observe(x_0, t_n, z)
    t = torch.full_like(t_n, t)

    def loss(weights, bias):
        return ambient_loss(lambda x_t, t: x_t @ weights.T + bias, schedule, x_n, t_n, t, xi, loss_space).mean()

    weights, bias = minimise_linear(loss)
    x_t = torch.tensor([[0.0, 0.0], [1.5, -0.5], [-2.0, 1.0]], dtype=torch.float64)
    epsilon = schedule.epsilon(x_t @ weights.T + bias, x_t, t[:3])
    want = data.epsilon(schedule, x_t, t[0])
    torch.testing.assert_close(epsilon, want, rtol=1e-6, atol=1e-6)
    alpha, sigma = schedule.alpha(t[0]), schedule.sigma(t[0])
    denoised = schedule.denoised(x_t @ weights.T + bias, x_t, t[:3])
    torch.testing.assert_close(denoised, (x_t - sigma * want) / alpha, rtol=1e-6, atol=1e-6)


class Mixture:
    """x_0 ~ three Gaussians on a line, well apart, so that the posterior mean is far from linear."""

    weight = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    mean = torch.tensor([-1.5, 0.4, 2.0], dtype=torch.float64)
    std = torch.tensor([0.2, 0.05, 0.4], dtype=torch.float64)

    def components(self, schedule, t):
        """Means and variances of the components of x_t."""
        return schedule.alpha(t) * self.mean, schedule.alpha(t) ** 2 * self.std**2 + schedule.sigma(t) ** 2

    def log_density(self, schedule, x, t):
        mean, variance = self.components(schedule, t)
        logs = self.weight.log() - 0.5 * ((x[:, None] - mean) ** 2 / variance + (2 * math.pi * variance).log())
        return logs.logsumexp(1)

    def x_s(self, schedule, x, s, t):
        """E[x_s|x_t = x] for s < t in closed form: the components' own posterior means, weighed by their posteriors."""
        mean_s, variance_s = self.components(schedule, s)
        mean_t, variance_t = self.components(schedule, t)
        logs = self.weight.log() - 0.5 * ((x[:, None] - mean_t) ** 2 / variance_t + variance_t.log())
        r = schedule.alpha(t) / schedule.alpha(s)
        each = mean_s + r * variance_s / variance_t * (x[:, None] - mean_t)
        return (logs.softmax(1) * each).sum(1)

    def epsilon(self, schedule, x, t):
        clean = torch.tensor(CLEAN)
        return (x - schedule.alpha(t) * self.x_s(schedule, x, clean, t)) / schedule.sigma(t)

    def posterior(self, schedule, x, t_n, t):
        """Values of x_n around its posterior given x_t = x, and their weights: a quadrature that is exact to 1e-12."""
        r, nu = schedule.transition(t_n, t)
        low = max(float(-9 * nu + x) / float(r), -12.0)
        high = min(float(9 * nu + x) / float(r), 12.0)
        x_n = torch.linspace(low, high, 40001, dtype=torch.float64)
        logs = self.log_density(schedule, x_n, t_n) - 0.5 * ((x - r * x_n) / nu) ** 2
        return x_n, logs.softmax(0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("t_n", "t"), PAIRS)
def test_mixture_minimiser_is_the_posterior_mean(t_n, t, prediction_type):
    """At a fixed x_t the loss is a parabola in the network's output; its vertex, by quadrature over all x_n that
    can have led there, is E[ε|x_t]."""
    schedule, data = sdxl(prediction_type), Mixture()
    t_n, t = torch.tensor(t_n), torch.tensor(t)
    r, nu = schedule.transition(t_n, t)
    for x in (-1.4, 0.1, 0.45, 1.3):
        x_n, weights = data.posterior(schedule, x, t_n, t)
        xi = (x - r * x_n) / nu
        many = len(x_n)

        def loss(output, x_n=x_n, xi=xi, weights=weights, many=many):
            level, time = t_n.expand(many), t.expand(many)
            values = ambient_loss(lambda x_t, t: output.expand(many, 1), schedule, x_n[:, None], level, time, xi[:, None])
            return (weights * values).sum()

        at = [loss(torch.tensor([[v]], dtype=torch.float64)).item() for v in (-1.0, 0.0, 1.0)]
        vertex = 0.5 * (at[0] - at[2]) / (at[0] - 2 * at[1] + at[2])
        x_t = torch.tensor([[x]], dtype=torch.float64)
        epsilon = schedule.epsilon(torch.tensor([[vertex]], dtype=torch.float64), x_t, t[None])
        want = data.epsilon(schedule, x_t[0], t)
        torch.testing.assert_close(epsilon[0], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("t_n", "t"), [p for p in PAIRS if p[0] != CLEAN])
def test_expected_x_n_is_the_posterior_mean_of_the_noisy_data(t_n, t):
    schedule, data = sdxl(), Mixture()
    t_n, t = torch.tensor(t_n), torch.tensor(t)
    x_t = torch.tensor([-2.0, -0.6, 0.3, 1.4], dtype=torch.float64)
    epsilon = data.epsilon(schedule, x_t, t)
    got = schedule.expected_x_n(epsilon[:, None], x_t[:, None], t_n.expand(4), t.expand(4))[:, 0]
    torch.testing.assert_close(got, data.x_s(schedule, x_t, t_n, t), rtol=1e-6, atol=1e-6)
    by_quadrature = [(v * w).sum() for v, w in (data.posterior(schedule, float(x), t_n, t) for x in x_t)]
    torch.testing.assert_close(got, torch.stack(by_quadrature), rtol=1e-6, atol=1e-6)
