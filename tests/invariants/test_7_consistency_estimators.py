"""Invariant 7: the two consistency gradient estimators have the same expectation."""

import pytest
import torch
from support.schedules import sdxl

from sdxl_ambient.objective import Anchor, ObjectiveOptions, consistency_loss
from sdxl_ambient.posterior import posterior_mean
from sdxl_ambient.randomness import Randomness


def times(*values):
    return torch.tensor(values)


class Linear:
    """ε̂ = W x + b, whose consistency loss has a closed form: the reverse step's mean goes through it unchanged."""

    def __init__(self):
        self.W = torch.tensor([[0.5, -0.2], [0.1, 0.7]], dtype=torch.float64, requires_grad=True)
        self.b = torch.tensor([0.3, -0.1], dtype=torch.float64, requires_grad=True)

    def __call__(self, x_t, t):
        return x_t @ self.W.T + self.b

    def gradient(self, loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [self.W, self.b])])


def exact_consistency(model, schedule, x_a, a, s, stop_anchor):
    """‖E[h(x_s, s)|x_a] − h(x_a, a)‖² with the sampler held fixed, for a linear model; scalar."""
    g = posterior_mean(model, schedule, x_a, a)
    with torch.no_grad():
        mean = schedule.reverse_step(x_a, g, a, s, torch.zeros_like(x_a))
    return (posterior_mean(model, schedule, mean, s) - (g.detach() if stop_anchor else g)).square().mean()


@pytest.mark.parametrize("stop_anchor", [False, True])
@pytest.mark.parametrize("estimator", ["single", "both"])
@pytest.mark.parametrize(("a", "s"), [(400, 200), (60, 0)])
def test_estimate_and_gradient_are_unbiased(a, s, estimator, stop_anchor):
    """Invariant 7: both estimators' means are the exact value and its gradient, within four standard errors."""
    schedule, model, many, chunks = sdxl(), Linear(), 2000, 60
    options = ObjectiveOptions(consistency_estimator=estimator, consistency_stop_anchor=stop_anchor)
    one = torch.tensor([[0.4, -0.9]], dtype=torch.float64)
    want = exact_consistency(model, schedule, one, times(a), times(s), stop_anchor)
    want_gradient = model.gradient(want)
    randomness = Randomness(torch.Generator().manual_seed(0), many)
    values, gradients = [], []
    for _ in range(chunks):
        x_a, at, to = one.expand(many, 2), times(a).expand(many), times(s).expand(many)
        anchor = posterior_mean(model, schedule, x_a, at)
        loss = consistency_loss(model, schedule, Anchor(x_a, at, anchor), to, randomness, options).mean()
        values.append(loss.detach())
        gradients.append(model.gradient(loss))
    for found, exact in ((torch.stack(values)[:, None], want[None]), (torch.stack(gradients), want_gradient)):
        error = found.std(0) / chunks**0.5
        assert bool(((found.mean(0) - exact).abs() < 4 * error + 1e-12).all()), (found.mean(0), exact, error)
        assert bool((error < 0.05 * exact.abs().max()).all())
