"""Noise levels as numbers, and what a network may say of them.

Levels are timesteps t_n from 0 to :data:`MAXIMUM_T_N`, and :data:`CLEAN` for pictures without noise.
"""

from __future__ import annotations

CLEAN = -1  # the noise level of clean data inside integer tensors
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")  # what a network may predict; the last is x_0
MAXIMUM_T_N = 998  # one level above it must be left to train on
