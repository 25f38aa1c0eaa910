"""What one noise path per picture and checked files cost, at SDXL's size.

    python -m benchmarks.observation --json benchmarks/results/observation.json

The noise of a picture's path at several levels against one draw for one level alone, as a store that knows no path makes
it: 64 bits of SHAKE-256 per number, and the normal quantile function. And checking a picture's stored latent and
its caption's embeddings against encoding it, with a VAE and text encoders of SDXL's size and random weights.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.special import ndtri

from benchmarks.record import target, write_record
from benchmarks.sdxl import sdxl_schedule, sdxl_vae
from sdxl_ambient.models.vae import encode_image
from sdxl_ambient.store.observation import bisection, draw_z
from sdxl_ambient.store.shards import check_shard, write_shard

SHAPE = (4, 128, 128)
KEY, WHAT, CONTENT = b"k" * 32, "00" * 32, "11" * 32
ROUND = (100, 200, 300, 400, 500, 600, 700, 800, 900)


def one_draw(count: int) -> np.ndarray:
    """Noise of one level alone."""
    stream = hashlib.shake_256(KEY + bytes(64)).digest(8 * count)
    cells = np.frombuffer(stream, dtype="<u8") >> np.uint64(12)
    return ndtri((cells.astype(np.float64) + 0.5) * 2.0**-52)


def fastest(function: Callable[[], object], repeats: int) -> float:
    """Seconds of processor time of this thread, the least of some repeats after one to warm up."""
    function()
    seconds = []
    for _ in range(repeats):
        start = time.thread_time()
        function()
        seconds.append(time.thread_time() - start)
    return min(seconds)


def path_costs(repeats: int, levels: list[int]) -> dict:
    """The path at each level, in units of one draw."""
    schedule = sdxl_schedule()
    once = fastest(lambda: one_draw(math.prod(SHAPE)), repeats)
    ratios = {t: fastest(lambda t=t: draw_z(KEY, WHAT, CONTENT, schedule, t, SHAPE), repeats) / once for t in levels}
    nodes = {t: 1 + len(list(bisection(t, 999))) for t in levels}
    return {"one_draw_seconds": once, "over_one_draw": {str(t): r for t, r in ratios.items()}, "nodes": nodes}


def checking_costs(side: int) -> dict:
    """Seconds of checking what is stored of one picture and its caption, and of encoding the picture."""
    vae = sdxl_vae(torch.float32)
    pixels = torch.rand(3, side, side).mul(2).sub(1)
    start = time.perf_counter()
    latent = encode_image(vae, pixels)
    encoding = time.perf_counter() - start
    tensors = {"latent": latent, "caption.embeds": torch.randn(77, 2048), "caption.pooled": torch.randn(1280)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "latents-00000.safetensors"
        hashes = write_shard(path, tensors)
        start = time.perf_counter()
        repeats = 20
        for _ in range(repeats):
            check_shard(path, hashes)
        checking = (time.perf_counter() - start) / repeats
    return {"side": side, "encode_seconds": encoding, "check_seconds": checking}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="few levels, a small picture")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    torch.set_num_threads(1)
    levels = [500, 333] if args.quick else sorted({*range(0, 999, 37), *ROUND, 998})
    path = path_costs(3 if args.quick else 10, levels)
    ratios = {int(t): r for t, r in path["over_one_draw"].items()}
    round_levels = [r for t, r in ratios.items() if t in ROUND]
    checking = checking_costs(256 if args.quick else 1024)
    figures = {
        "path": path,
        "path_over_draw_mean": statistics.mean(ratios.values()),
        "path_over_draw_worst": max(ratios.values()),
        "checking": checking,
    }
    targets = [
        target("path_over_draw", ratios[500], "<=", 3),  # the default level
        target("path_over_draw_round_levels", max(round_levels), "<=", 3),
        target("path_over_draw_any_level", max(ratios.values()), "<=", 3),
        target("verify_over_encode", checking["check_seconds"] / checking["encode_seconds"], "<=", 0.02),
    ]
    write_record(args.json, "observation", figures, targets, started)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
