"""Images → features, in batches, computed once per content: image, embedder, preprocessing and weights are the
cache's key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from eval.embedders import Embedder
from eval.images import ImageSet, StageError
from sdxl_ambient.images import ImageError, load_rgb
from sdxl_ambient.manifest import atomic, hash_bytes

_SHARD = 1024  # images per cache file: what an interruption can lose


@dataclass
class Embedded:
    """Features of the usable images of a set.

    Attributes:
        images: the images that have features; ``images.excluded`` says what was left out and why.
        features: float32 array of shape (n, d), as the embedder gave them.
        computed: how many of the n were not in the cache.
    """

    images: ImageSet
    features: np.ndarray
    computed: int

    def __len__(self) -> int:
        return len(self.features)

    @property
    def embeddings(self) -> np.ndarray:
        """L2-normalised features, float32 of shape (n, d). A zero vector, such as ``pixel`` of a uniform image,
        stays zero.
        """
        return normalised(self.features)


def normalised(features: np.ndarray) -> np.ndarray:
    """Rows divided by their Euclidean norms; zero rows stay zero, so that they resemble nothing."""
    norms = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    return np.divide(features, norms, out=np.zeros(features.shape), where=norms > 0).astype(np.float32)


class FeatureCache:
    """Features by the SHA-256 of an image file, in safetensors shards that are only ever added."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.features: dict[str, np.ndarray] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name.startswith("."):
                continue  # being written by another process, or left by one that was killed
            try:
                shard = load_file(path)
                hashes, features = shard["hashes"], shard["features"]
            except (SafetensorError, KeyError, OSError) as error:
                raise StageError(f"the cached embeddings in {path} are damaged ({error}); delete that file") from None
            self.features.update(zip((bytes(h).hex() for h in hashes), features, strict=True))

    def add(self, hashes: list[str], features: np.ndarray) -> None:
        """Write one shard, whole or not at all, named by what it holds."""
        keys = np.frombuffer(bytes.fromhex("".join(hashes)), dtype=np.uint8).reshape(len(hashes), 32)
        with atomic(self.folder / f"{hash_bytes(keys.tobytes())[:24]}.safetensors") as temporary:
            save_file({"hashes": keys.copy(), "features": np.ascontiguousarray(features)}, temporary)
        self.features.update(zip(hashes, features, strict=True))


def embed_images(
    images: ImageSet, embedder: Embedder, cache_dir: str | Path, batch_size: int = 32, progress=None
) -> Embedded:
    """Features of every usable image of a set; unusable ones are left out and listed.

    Args:
        cache_dir: holds one folder per embedder; what is there is not computed again.
        progress: called with the number of images done after each batch.

    Raises:
        StageError: a feature that isn't finite (the message names the image), or no usable image.
    """
    cache = FeatureCache(Path(cache_dir) / embedder.key)
    missing = [i for i, digest in enumerate(images.hashes) if digest not in cache.features]
    unusable: dict[int, str] = {}
    pending_hashes, pending = [], []
    for indices, batch in _batches(images, missing, embedder, batch_size, unusable):
        features = embedder.encode(batch).numpy()
        _check_finite(features, images, indices, embedder)
        pending_hashes += [images.hashes[i] for i in indices]
        pending.append(features)
        if len(pending_hashes) >= _SHARD:
            cache.add(pending_hashes, np.concatenate(pending))
            pending_hashes, pending = [], []
        if progress:
            progress(len(indices))
    if pending:
        cache.add(pending_hashes, np.concatenate(pending))
    kept = [i for i in range(len(images)) if i not in unusable]
    if not kept:
        first = next(iter(unusable.values()), images.excluded[0]["reason"] if images.excluded else "none there")
        raise StageError(f"{images.folder}: no usable image; the first problem: {first}")
    excluded = [{"file": images.name(i), "reason": reason} for i, reason in unusable.items()]
    features = np.stack([cache.features[images.hashes[i]] for i in kept]).astype(np.float32)
    return Embedded(images.subset(kept, excluded), features, len(missing) - len(unusable))


def _batches(
    images: ImageSet, indices: list[int], embedder: Embedder, batch_size: int, unusable: dict[int, str]
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Prepared pixels, ``batch_size`` at a time; an image that can't be used goes into ``unusable`` with the reason."""
    held, pixels = [], []
    for index in indices:
        try:
            prepared = embedder.prepare(load_rgb(images.records[index].path))
        except ImageError as error:
            unusable[index] = str(error)
            continue
        held.append(index)
        pixels.append(prepared)
        if len(held) == batch_size:
            yield held, torch.stack(pixels)
            held, pixels = [], []
    if held:
        yield held, torch.stack(pixels)


def _check_finite(features: np.ndarray, images: ImageSet, indices: list[int], embedder: Embedder) -> None:
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if bad.size:
        path = images.records[indices[bad[0]]].path
        raise StageError(f"{path}: its {embedder.name} embedding is not finite; the weights may be damaged")
