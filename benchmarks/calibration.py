"""Whether the evaluation's interval covers the truth: data made from known parts, where the copied share is known.

    python -m benchmarks.calibration [--quick] --json benchmarks/results/calibration.json

A source of unit vectors (clusters of directions with spread, so that unrelated images differ in how near they come) gives
a training set T, a held-out set H and generated images, of which a share p are copies of training images, disturbed as a
generator would. Everything then goes the evaluation's way: nearest neighbours, the threshold from H, the recall of
planted copies, the copied share with its interval. Reported per p over many repetitions: how often the interval covers p,
and how often a model that copies nothing is accused.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from benchmarks.record import target, write_record
from eval.neighbours import nearest
from eval.statistics.calibrate import MonteCarlo, copied_share, threshold

SHARES = (0.0, 0.01, 0.05, 0.2)
WIDTH, CONCEPTS, SPREAD, DISTURBED = 64, 40, 0.9, 0.5
ALPHA, CONFIDENCE = 0.02, 0.95


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


class Source:
    """Embeddings of one kind of picture: a concept's direction plus noise of its own size per image."""

    def __init__(self, generator: np.random.Generator):
        self.generator = generator
        self.concepts = unit(generator.standard_normal((CONCEPTS, WIDTH)))

    def draw(self, count: int) -> np.ndarray:
        which = self.generator.integers(CONCEPTS, size=count)
        size = SPREAD * self.generator.uniform(0.5, 1.5, (count, 1)) / WIDTH**0.5
        return unit(self.concepts[which] + size * self.generator.standard_normal((count, WIDTH)))

    def copies(self, images: np.ndarray, count: int) -> np.ndarray:
        """``count`` of the images, each disturbed by another amount: some beyond recognition."""
        picked = images[self.generator.integers(len(images), size=count)]
        size = DISTURBED * self.generator.uniform(0, 2, (count, 1)) / WIDTH**0.5
        return unit(picked + size * self.generator.standard_normal(picked.shape))


def once(share: float, seed: int, n_train: int, n_heldout: int, n_generated: int, n_planted: int) -> dict:
    """One evaluation of one generator."""
    generator = np.random.default_rng([seed, round(share * 1000)])
    source = Source(generator)
    train, heldout = source.draw(n_train), source.draw(n_heldout)
    copied = generator.binomial(n_generated, share)
    generated = np.concatenate([source.copies(train, copied), source.draw(n_generated - copied)])
    null, found, planted = (nearest(x, train, 1)[0][:, 0] for x in (heldout, generated, source.copies(train, n_planted)))
    tau = threshold(null, ALPHA)
    above, recalled = int((found > tau).sum()), int((planted > tau).sum())
    estimate = copied_share(above, n_generated, recalled, n_planted, n_heldout, ALPHA, CONFIDENCE, MonteCarlo(20_000, seed))
    return dict(
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        recall=recalled / n_planted,
        covered=estimate.low <= share <= estimate.high,
        accused=estimate.low > 0,
    )


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="ten repetitions")
    parser.add_argument("--repetitions", type=int, default=400)
    args = parser.parse_args(argv)
    started = time.perf_counter()
    sizes = dict(n_train=500, n_heldout=500, n_generated=1000, n_planted=500)
    figures = {"settings": {"alpha": ALPHA, "confidence": CONFIDENCE, **sizes}}
    for share in SHARES:
        runs = [once(share, seed, **sizes) for seed in range(10 if args.quick else args.repetitions)]
        means = {name: float(np.mean([r[name] for r in runs])) for name in runs[0]}
        figures[str(share)] = {**means, "repetitions": len(runs)}
        print(f"p {share}: " + " ".join(f"{k} {v:.3f}" for k, v in means.items()), flush=True)
    coverage = min(figures[str(p)]["covered"] for p in SHARES)
    targets = [
        target("interval_coverage", coverage, ">=", 0.9),
        target("false_alarm_rate", figures["0.0"]["accused"], "<=", 1 - CONFIDENCE),
    ]
    write_record(args.json, "calibration", figures, targets, started)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
