"""A data distribution whose posterior mean is known in closed form."""

import itertools

import torch


class Gaussian:
    """x_0 ~ N(mean, covariance) in two dimensions."""

    mean = torch.tensor([0.7, -1.2], dtype=torch.float64)
    covariance = torch.tensor([[0.8, 0.3], [0.3, 0.25]], dtype=torch.float64)

    def epsilon(self, schedule, x_t, t):
        """E[ε|x_t] in closed form."""
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        total = alpha**2 * self.covariance + sigma**2 * torch.eye(2, dtype=torch.float64)
        return sigma * torch.linalg.solve(total, (x_t - alpha * self.mean).T).T

    def points(self):
        """64 equally likely (x_0, z, ξ) with exactly the first and second moments of the three Gaussians, so that the
        mean of any quadratic over them is its exact expectation."""
        signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)), dtype=torch.float64)
        x_0 = self.mean + signs[:, :2] @ torch.linalg.cholesky(self.covariance).T
        return x_0, signs[:, 2:4], signs[:, 4:]
