r"""The one noise path of each picture: how a key and a picture's content become its noise at any level.

In the noise-to-signal ratio v_t = σ_t²/α_t² the forward process is a Brownian motion, x_t/α_t = x_0 + W(v_t). So the noise
of a picture is one path W, and z at level t is W(v_t)/√v_t. The last level of the schedule is drawn first, then levels
between two known ones (Lévy's construction of Brownian motion):

    W(v_m) = ((v_b − v_m) W(v_a) + (v_m − v_a) W(v_b)) / (v_b − v_a) + √((v_m − v_a)(v_b − v_m)/(v_b − v_a)) G_m

Between any two levels s < t of one path, x_t = r x_s + ν ξ, with ξ the path's own increment, independent of x_s given x_0.
Whoever has a picture at several levels therefore knows what the one with the least noise tells, and nothing more.
(Independent draws tell more: their average. One z at two levels tells everything: two equations, two unknowns.)

G_m comes from SHAKE-256(key ‖ what ‖ content ‖ m): a cryptographic stream, since the usual generators are seeded with 32 or
64 bits, which can be tried one by one against a stored x_n. ``content`` is the hash of the picture's pixels and ``what`` the
hash of all that shapes its latent. A draw depends on nothing else: not on the order of the images, the batch, the folder,
the level that was drawn before, or how many processes there are.

Source: P. Lévy, Processus stochastiques et mouvement brownien, 1948; Daras et al., arXiv 2404.10177, for x_t of x_n.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch

from sdxl_ambient.noise import NoiseSchedule

_CLEAN = -1  # the level below the first, where v = 0
_ROUND = 100


def draw_z(key: bytes, what: str, content: str, schedule: NoiseSchedule, t_n: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise of ``shape``, float64: the picture's path at level ``t_n``, in units of its own deviation.

    Args:
        key: 32 secret bytes.
        what, content: SHA-256 in hexadecimal, of what shapes the latent and of the picture's pixels.
        t_n: a timestep of ``schedule`` that has some signal left.
    """
    v = noise_to_signal(schedule)
    seed = key + bytes.fromhex(what) + bytes.fromhex(content)
    count, last = math.prod(shape), len(v) - 1
    # W at the two known levels about t_n. Nothing is drawn at v = 0, where W = 0.
    lower, upper = torch.zeros(count, dtype=torch.float64), math.sqrt(v[last]) * _normal(seed, last, count)
    path = upper
    for a, m, b in bisection(t_n, last):
        v_a, v_m, v_b = (0.0 if t == _CLEAN else v[t] for t in (a, m, b))
        share, deviation = (v_m - v_a) / (v_b - v_a), math.sqrt((v_m - v_a) * (v_b - v_m) / (v_b - v_a))
        path = _normal(seed, m, count).mul_(deviation).add_(lower, alpha=1 - share).add_(upper, alpha=share)
        lower, upper = (path, upper) if m < t_n else (lower, path)
    return (path / math.sqrt(v[t_n])).reshape(shape)


def noise_to_signal(schedule: NoiseSchedule) -> list[float]:
    """v_t = σ_t²/α_t² of every timestep with some signal, rising; all of them but where the terminal SNR is zero."""
    bars = schedule.alpha_bar(torch.arange(schedule.num_timesteps)).tolist()
    return [(1 - bar) / bar for bar in bars if bar > 0]


def bisection(level: int, last: int) -> Iterator[tuple[int, int, int]]:
    """The levels drawn after ``last`` on the way to ``level``, each as (known below, drawn, known above); −1 is v = 0.

    Multiples of 100 come first, since users ask for those: of 1,000 levels, five draws reach each of them and twelve any.
    """
    below, above = _CLEAN, last
    while level not in (below, above):
        middle = (below + above) // 2
        rounded = _ROUND * round(middle / _ROUND)
        drawn = rounded if below < rounded < above else middle
        yield below, drawn, above
        below, above = (drawn, above) if drawn <= level else (below, drawn)


def _normal(seed: bytes, node: int, count: int) -> torch.Tensor:
    """(count,) float64 standard normal numbers of a node.

    32 bits of the stream make a number at the middle of its cell in (−1, 1), never an end, and the normal quantile function
    makes it normal. Cells are finer than the float32 numbers that a store holds.
    """
    stream = hashlib.shake_256(seed + node.to_bytes(4, "little")).digest(4 * count)
    cells = torch.frombuffer(bytearray(stream), dtype=torch.int32).double()
    return cells.add_(0.5).mul_(2.0**-31).erfinv_().mul_(math.sqrt(2))
