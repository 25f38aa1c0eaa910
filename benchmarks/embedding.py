"""What the cache of embeddings saves: the embedding stage from nothing and again, and memory at a million images.

    python -m benchmarks.embedding [--quick] [--large] --json benchmarks/results/embedding.json

Emoji, enlarged to 512 pixels and with a camera's noise, as JPEG files. The stage is what ``python -m eval.embed`` does:
load the embedder and hash its weights, list the folder and hash every file, embed what is not in the cache, read all of it
from there. Cold starts from an empty cache; warm is the same again, in the same process, with files that are in the
system's memory both times. It is timed with a DINOv2 of ViT-L/14's size, whose random weights cost what trained ones do,
and with ``pixel``, the cheapest embedder, where decoding is most of the work. The second ratio leaves out loading the
embedder, which both runs do and which weighs the more, the fewer images there are.

``--large`` reads a cache of a million embeddings of width 1024, in another order than they were stored. Peak memory is that
of the whole process with its libraries.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measuring import in_a_process, peak_of
from benchmarks.record import ROOT, target, write_record
from eval.embedders.registry import load_embedder
from eval.embedding import FeatureCache, embed_images
from eval.images import read_folder
from sdxl_ambient.images.load import list_images, load_rgb

SIDE = 512
# hidden size, layers, heads
VIT_L, VIT_S = (1024, 24, 16), (384, 12, 6)
SHARD = 1024  # as many rows as a shard of the evaluation's cache holds


def write_photographs(folder: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    for record in list_images(ROOT / "miniature/data/pretrain")[:count]:
        pixels = np.asarray(load_rgb(record.path).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
        pixels = pixels + 4 * generator.standard_normal(pixels.shape, dtype=np.float32)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{record.path.stem}.jpg", quality=92)


def write_dinov2(folder: Path, hidden: int, layers: int, heads: int) -> None:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, patch_size=14, image_size=518
    )
    Dinov2Model(config).save_pretrained(folder)


# -- the stage, cold and warm -------------------------------------------------------------------------------------


def stage(folder: Path, name: str, weights: str | None, cache: Path):
    """The embeddings, and the seconds that loading the embedder and all the rest took."""
    start = time.perf_counter()
    embedder = load_embedder(name, weights)
    loaded = time.perf_counter()
    found = embed_images(read_folder(folder), embedder, cache)
    return found, loaded - start, time.perf_counter() - loaded


def cold_and_warm(folder: Path, name: str, weights: str | None, cold_rounds: int, warm_rounds: int) -> dict:
    """Medians of seconds, cold and warm, with their ratios."""
    seconds = {"cold": [], "warm": []}
    for _ in range(cold_rounds):
        with tempfile.TemporaryDirectory() as cache:
            first, *took = stage(folder, name, weights, Path(cache))
            seconds["cold"].append(took)
            for _ in range(warm_rounds):
                again, *took = stage(folder, name, weights, Path(cache))
                seconds["warm"].append(took)
                if again.computed or not np.array_equal(first.embeddings, again.embeddings):
                    raise RuntimeError(f"{name}: the warm run computed {again.computed} images, or other embeddings")
            if first.computed != len(first):
                raise RuntimeError(f"{name}: the cold run found {len(first) - first.computed} images in an empty cache")
    figures = {"images": len(first), "width": first.embeddings.shape[1]}
    for kind, pairs in seconds.items():
        figures[kind] = {
            "seconds": statistics.median(sum(pair) for pair in pairs),
            "loading_seconds": statistics.median(pair[0] for pair in pairs),
            "embedding_seconds": statistics.median(pair[1] for pair in pairs),
            "rounds": len(pairs),
        }
    figures["speedup"] = figures["cold"]["seconds"] / figures["warm"]["seconds"]
    figures["speedup_without_loading"] = figures["cold"]["embedding_seconds"] / figures["warm"]["embedding_seconds"]
    return figures


# -- a million ----------------------------------------------------------------------------------------------------


def shard(index: int, rows: int, width: int) -> tuple[list[str], np.ndarray]:
    """Hashes and features, the same for the same index."""
    generator = np.random.default_rng(index)
    hashes = [generator.bytes(32).hex() for _ in range(rows)]
    return hashes, generator.standard_normal((rows, width), dtype=np.float32)


def sizes(count: int) -> list[int]:
    return [min(SHARD, count - start) for start in range(0, count, SHARD)]


def write_cache(folder: Path, count: int, width: int) -> float:
    start, cache = time.perf_counter(), FeatureCache(folder)
    for index, rows in enumerate(sizes(count)):
        cache.add(*shard(index, rows, width))
    return time.perf_counter() - start


def read_cache(folder: Path, count: int, width: int) -> dict:
    hashes = [digest for index, rows in enumerate(sizes(count)) for digest in shard(index, rows, 0)[0]]
    order = np.random.default_rng(count).permutation(count)
    wanted = [hashes[i] for i in order]
    del hashes
    start = time.perf_counter()

    def opened():
        cache = FeatureCache(folder)
        return cache.read(wanted), time.perf_counter() - start

    grown, peak, ((embeddings, norms), seconds) = peak_of(opened)
    expected = shard(0, min(SHARD, count), width)[1]
    rows = np.flatnonzero(order < len(expected))
    gap = np.abs(embeddings[rows] * norms[rows, None] - expected[order[rows]]).max()
    if gap > 1e-5:
        raise RuntimeError(f"features read from the cache are {gap:.2g} off")
    return {"seconds": seconds, "growth_gib": grown / 2**30, "peak_gib": peak / 2**30}


def large_cache(count: int, width: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        writing = in_a_process(write_cache, Path(folder), count, width)
        figures = in_a_process(read_cache, Path(folder), count, width)
    size = {"embeddings": count, "width": width, "shards": len(sizes(count)), "array_gib": 4 * count * width / 2**30}
    return {**size, "writing_seconds": writing, **figures}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="a twentieth of everything, ViT-S/14's size, no targets")
    parser.add_argument("--large", action="store_true", help="also a million embeddings: 4 GB on disk, some minutes")
    parser.add_argument("--images", type=int, default=200)
    args = parser.parse_args(argv)
    started = time.perf_counter()
    fewer, vit = (20, VIT_S) if args.quick else (1, VIT_L)
    count = max(2, args.images // fewer)
    model = dict(zip(("hidden_size", "layers", "heads"), vit, strict=True))
    figures = {"side": SIDE, "dinov2_model": {**model, "patch_size": 14, "weights": "random"}}
    with tempfile.TemporaryDirectory() as folder:
        photographs, weights = Path(folder) / "photographs", Path(folder) / "dinov2"
        photographs.mkdir()
        write_photographs(photographs, count)
        figures["bytes_per_file"] = statistics.mean(path.stat().st_size for path in photographs.iterdir())
        write_dinov2(weights, *vit)
        figures["pixel"] = cold_and_warm(photographs, "pixel", None, cold_rounds=3, warm_rounds=3)
        print(figures["pixel"], flush=True)
        figures["dinov2"] = cold_and_warm(photographs, "dinov2", str(weights), cold_rounds=1, warm_rounds=5)
        print(figures["dinov2"], flush=True)
    targets = [] if args.quick else [target("warm_cache_speedup", figures["dinov2"]["speedup"], ">=", 20)]
    if args.large:
        figures["large"] = large_cache(1_000_000 // fewer, 1024)
        print(figures["large"], flush=True)
        targets += [] if args.quick else [target("peak_gib_read_1m", figures["large"]["peak_gib"], "<=", 6)]
    write_record(args.json, "embedding", figures, targets, started)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
