"""The ambient loss against closed forms (Gaussian and mixture data) and against diffusers' plain denoising loss."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from support.gaussian import Gaussian

from sdxl_ambient.levels import CLEAN
from sdxl_ambient.models.denoiser import Conditioning, Denoiser
from sdxl_ambient.noise import PREDICTION_TYPES, NoiseSchedule, levels
from sdxl_ambient.objective import CHOICES, ObjectiveOptions, ambient_loss, ambient_objective
from sdxl_ambient.randomness import Randomness

SDXL = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
LOSS_SPACES = CHOICES["loss_space"]
PAIRS = [(CLEAN, 0), (CLEAN, 700), (0, 1), (100, 101), (100, 800), (500, 501), (500, 999), (998, 999)]


def sdxl(prediction_type="epsilon"):
    return NoiseSchedule.from_scheduler(DDPMScheduler(**SDXL, prediction_type=prediction_type))


# -- invariant 1: the minimiser is the posterior mean ----------------------------------------------------------


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


# -- invariant 2: clean data gives the plain denoising loss --------------------------------------------------


@pytest.fixture(scope="module")
def conditioning():
    generator = torch.Generator().manual_seed(1)
    return Conditioning(
        torch.randn(4, 77, 80, generator=generator),
        torch.randn(4, 48, generator=generator),
        torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 4),
    )


def test_clean_data_gives_the_plain_loss_and_gradients_bit_for_bit(unet, conditioning):
    plain, ambient = copy.deepcopy(unet).requires_grad_(True), copy.deepcopy(unet).requires_grad_(True)
    pooled_width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    conditioning.pooled = conditioning.pooled[:, :pooled_width]
    scheduler, schedule = DDPMScheduler(**SDXL), sdxl()
    x_0 = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    losses = ambient_objective(
        Denoiser(ambient, conditioning), schedule, x_0, levels(None, 4), torch.Generator().manual_seed(3)
    )
    losses.total.backward()

    # What the diffusers examples do, with the same draws.
    randomness = Randomness(torch.Generator().manual_seed(3), len(x_0))
    noise = (randomness.uniform(), randomness.normal(x_0))[1]
    noisy = scheduler.add_noise(x_0, noise, losses.t)
    prediction = plain(
        noisy,
        losses.t,
        encoder_hidden_states=conditioning.prompt_embeds,
        added_cond_kwargs={"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids},
    ).sample
    per_sample = F.mse_loss(prediction.float(), noise.float(), reduction="none")
    per_sample = per_sample.mean(dim=list(range(1, per_sample.ndim)))
    per_sample.mean().backward()
    assert torch.equal(losses.ambient, per_sample)
    assert torch.equal(losses.total, per_sample.mean())
    for (name, p), q in zip(plain.named_parameters(), ambient.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    # The examples without SNR weights take the mean over everything at once: equal up to the order of summation.
    plain.zero_grad()
    whole = F.mse_loss(plain(
        noisy, losses.t, encoder_hidden_states=conditioning.prompt_embeds,
        added_cond_kwargs={"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids},
    ).sample.float(), noise.float(), reduction="mean")  # fmt: skip
    whole.backward()
    torch.testing.assert_close(losses.total, whole, rtol=1e-6, atol=0)
    for (name, p), q in zip(plain.named_parameters(), ambient.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_clean_samples_in_a_mixed_batch_have_the_plain_loss():
    schedule = sdxl()
    x, xi, output = (torch.randn(3, 4, 8, 8) for _ in range(3))
    t_n, t = torch.tensor([CLEAN, 300, CLEAN]), torch.tensor([5, 600, 999])
    loss = ambient_loss(lambda x_t, t: output, schedule, x, t_n, t, xi)
    plain = F.mse_loss(output, xi, reduction="none").mean((1, 2, 3))
    assert torch.equal(loss[[0, 2]], plain[[0, 2]]) and loss[1] != plain[1]


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
