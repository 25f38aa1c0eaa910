"""The curves that are drawn."""

import numpy as np

from eval.reporting.plots import survival


def test_survival_is_the_share_strictly_above():
    x, share = survival([0.5, 0.2, 0.9, 0.5])
    for at in (0.1, 0.2, 0.4, 0.5, 0.7, 0.9):
        value = share[np.searchsorted(x, at, side="right") - 1]
        assert value == np.mean(np.array([0.5, 0.2, 0.9, 0.5]) > at)
