"""What DP-SGD may spend, and the noise that spends it; by opacus's accountants. Needs the package opacus."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sdxl_ambient.errors import OptionError, one_line


def check_opacus() -> None:
    """Raises OptionError where opacus, which is optional, is not there."""
    try:
        import opacus  # noqa: F401
    except ImportError as error:
        why = one_line(error, most=None)
        raise OptionError(f"DP-SGD needs the package opacus (pip install opacus==1.6.0): {why}") from None


@dataclass(frozen=True)
class Budget:
    """What is spent: (ε, δ) over ``steps`` steps that draw each of ``images`` images with probability ``sample_rate``."""

    epsilon: float
    delta: float
    steps: int
    images: int
    batch_size: int
    accountant: str = "prv"

    @property
    def sample_rate(self) -> float:
        return self.batch_size / self.images

    @property
    def tolerance(self) -> float:
        """Of ε: 0.01, as opacus has it, but a thousandth of a large ε, since PRV's time and memory go with ε/error."""
        return max(0.01, self.epsilon / 1000)

    @property
    def error(self) -> dict:
        """What the accountant is told of its precision."""
        return {} if self.accountant == "rdp" else {"eps_error": self.tolerance}

    def spent(self, noise_multiplier: float, steps: int) -> float:
        """ε after so many steps."""
        from opacus.accountants import create_accountant

        accountant = create_accountant(mechanism=self.accountant)
        accountant.history = [(noise_multiplier, self.sample_rate, steps)]
        with _accounting():
            return float(accountant.get_epsilon(delta=self.delta, **self.error))


@functools.cache  # a search of seconds, the same for every seed
def noise_multiplier_of(budget: Budget) -> float:
    """The noise's standard deviation in units of C that spends ε, or a little less.

    Raises:
        OptionError: an ε that no noise is enough for.
    """
    from opacus.accountants.utils import get_noise_multiplier

    try:
        with _accounting():
            multiplier = get_noise_multiplier(
                target_epsilon=budget.epsilon,
                target_delta=budget.delta,
                epsilon_tolerance=budget.tolerance,
                sample_rate=budget.sample_rate,
                steps=budget.steps,
                accountant=budget.accountant,
                **budget.error,
            )
        return float(multiplier)
    except ValueError as error:
        raise OptionError(f"--epsilon: {budget.epsilon} can't be had with delta = {budget.delta:.3g}: {error}") from None


@contextlib.contextmanager
def _accounting() -> Iterator[None]:
    """Without the accountants' remarks: log(0) where q = 1, which they handle, and orders of RDP that could be finer."""
    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.filterwarnings("ignore", "Optimal order is")
        yield
