"""Images → embeddings, with a cache beside them that is read again where nothing has changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from eval.embedders.registry import Embedder
from eval.images import ImageSet
from eval.processes import collect, is_main, share, wait
from eval.schema import Excluded
from sdxl_ambient.errors import ImageError, StageError, one_line
from sdxl_ambient.formats.record import DAMAGED_FILE
from sdxl_ambient.images.load import load_rgb
from sdxl_ambient.provenance import atomic, hash_bytes, parse_json
from sdxl_ambient.store.shards import tensor_hash

_CHECKSUMS = "sha256"
_SHARD = 1024  # images per cache file: what being killed can lose


@dataclass
class Embedded:
    """Embeddings of the usable images of a set.

    Attributes:
        images: the images that have features; ``images.excluded`` says what was left out and why.
        embeddings: float32 array of shape (n, d), L2-normalised. A zero vector stays zero. The only copy: a million
            images of width 1024 take 4 GB.
        norms: float32 array of shape (n,), by which they were divided.
        computed: how many of the n were not in the cache (of this process).
    """

    images: ImageSet
    embeddings: np.ndarray
    norms: np.ndarray
    computed: int = 0

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def features(self) -> np.ndarray:
        """As the embedder gave them, to float32's rounding."""
        return self.embeddings * self.norms[:, None]

    def thinned(self, most: int) -> Embedded:
        """At most ``most`` of the images, evenly."""
        if len(self) <= most:
            return self
        return self.subset(np.arange(most) * len(self) // most)

    def subset(self, indices: Sequence[int] | np.ndarray) -> Embedded:
        """The images at ``indices``."""
        return Embedded(self.images.subset(indices), self.embeddings[indices], self.norms[indices])

    def only(self, images: ImageSet) -> Embedded:
        """The images that are also in ``images``, a subset of the set's, with what that lists as excluded."""
        if len(images) == len(self):
            return Embedded(images, self.embeddings, self.norms, self.computed)
        kept = {record.path for record in images.records}
        indices = [i for i, record in enumerate(self.images.records) if record.path in kept]
        return Embedded(images, self.embeddings[indices], self.norms[indices], self.computed)


def normalised(features: np.ndarray) -> np.ndarray:
    """Rows divided by their Euclidean norms; zero rows stay zero, so that they resemble nothing."""
    return _divided(features)[0]


def _divided(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    norms = np.linalg.norm(features.astype(np.float64), axis=1)
    unit = np.divide(features, norms[:, None], out=np.zeros(features.shape), where=norms[:, None] > 0)
    return unit.astype(np.float32), norms.astype(np.float32)


class FeatureCache:
    """Features by the SHA-256 of an image file, in safetensors shards that are only ever added.

    In memory is only where each image's features are; they are read when they are asked for.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.place: dict[str, tuple[Path, int]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            if not path.name.startswith("."):  # being written by another process, or left by one that was killed
                hashes, features = _read(path, "hashes"), _shape(path, "features")
                if len(features) != 2 or hashes.dtype != np.uint8 or hashes.shape != (features[0], 32):
                    raise _damaged(path, f"{hashes.shape} hashes of {features} features")
                self.place.update((bytes(h).hex(), (path, row)) for row, h in enumerate(hashes))

    def __contains__(self, digest: str) -> bool:
        return digest in self.place

    def add(self, hashes: list[str], features: np.ndarray) -> None:
        """Write one shard, whole or not at all, named by what it holds."""
        keys = np.frombuffer(bytes.fromhex("".join(hashes)), dtype=np.uint8).reshape(len(hashes), 32)
        path = self.folder / f"{hash_bytes(keys.tobytes())[:24]}.safetensors"
        with atomic(path) as temporary:
            tensors = {"hashes": keys.copy(), "features": np.ascontiguousarray(features)}
            checksums = json.dumps({name: _checksum(name, array) for name, array in tensors.items()})
            save_file(tensors, temporary, metadata={_CHECKSUMS: checksums})
        self.place.update((digest, (path, row)) for row, digest in enumerate(hashes))

    def read(self, hashes: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The images' embeddings (n, d), normalised, and norms (n,), a shard at a time. All must be in the cache."""
        by_shard: dict[Path, list[tuple[int, int]]] = {}
        for i, digest in enumerate(hashes):
            path, row = self.place[digest]
            by_shard.setdefault(path, []).append((i, row))
        embeddings, norms = np.empty((0, 0), np.float32), np.empty(len(hashes), np.float32)
        for path, rows in by_shard.items():
            features = _read(path, "features")
            if not np.isfinite(features).all() or (embeddings.size and features.shape[1] != embeddings.shape[1]):
                raise _damaged(path, "features that are not finite, or of another width")
            into, source = (np.array(column) for column in zip(*rows, strict=True))
            if not embeddings.size:
                embeddings = np.empty((len(hashes), features.shape[1]), np.float32)
            embeddings[into], norms[into] = _divided(features[source].astype(np.float32))
        return embeddings, norms


def _read(path: Path, name: str) -> np.ndarray:
    """An array of a shard, every bit checked."""
    try:
        with safe_open(path, "np") as shard:
            array, metadata = shard.get_tensor(name), shard.metadata() or {}
        checksums = parse_json(metadata.get(_CHECKSUMS, "{}"), str(path))
        wanted = checksums.get(name) if isinstance(checksums, dict) else None
    except DAMAGED_FILE as error:
        raise _damaged(path, one_line(error)) from None
    if wanted != _checksum(name, array):
        raise _damaged(path, f"{name} are not as they were written" if wanted else "without a checksum")
    return array


def _checksum(name: str, array: np.ndarray) -> str:
    """SHA-256 of an array's name, dtype, shape and bytes, as a store's shard has it."""
    return tensor_hash(name, torch.from_numpy(np.ascontiguousarray(array)))


def _shape(path: Path, name: str) -> list[int]:
    try:
        with safe_open(path, "np") as shard:
            return shard.get_slice(name).get_shape()
    except DAMAGED_FILE as error:
        raise _damaged(path, one_line(error)) from None


def _damaged(path: Path, problem: str) -> StageError:
    return StageError(f"the cached embeddings in {path} are damaged ({problem}); delete that file and run again")


def embed_images(
    images: ImageSet,
    embedder: Embedder,
    cache_dir: str | Path,
    batch_size: int = 32,
    progress: Callable[[int], object] | None = None,
) -> Embedded:
    """Features of every usable image of a set; unusable ones are left out and listed. All processes call it and share
    the batches; each returns the whole.

    Args:
        cache_dir: holds one folder per embedder; what is there is not computed again.
        progress: called with the number of images done after each batch.

    Raises:
        StageError: a feature that isn't finite (the message names the image), or no usable image.
    """
    folder = Path(cache_dir) / embedder.key
    cache = FeatureCache(folder)
    missing = [i for i, digest in enumerate(images.hashes) if digest not in cache]
    wait()  # all must have seen the same cache before any adds to it
    # Batches are cut before they are dealt out, and unusable images leave gaps: who computes changes no number.
    batches = share([missing[i : i + batch_size] for i in range(0, len(missing), batch_size)])
    unusable: dict[int, str] = {}
    computed = 0
    pending_hashes: list[str] = []
    pending: list[np.ndarray] = []
    try:
        for indices, batch in _batches(images, batches, embedder, unusable):
            features = embedder.encode(batch).numpy()
            _check_finite(features, images, indices, embedder)
            pending_hashes += [images.hashes[i] for i in indices]
            pending.append(features)
            computed += len(indices)
            if len(pending_hashes) >= _SHARD:
                cache.add(pending_hashes, np.concatenate(pending))
                pending_hashes, pending = [], []
            if progress:
                progress(len(indices))
    finally:  # what an interruption or an error found done is kept
        if pending:
            cache.add(pending_hashes, np.concatenate(pending))
    unusable = dict(sorted(collect(list(unusable.items()))))
    wait()
    return _gathered(images, FeatureCache(folder), unusable, computed)


def _gathered(images: ImageSet, cache: FeatureCache, unusable: dict[int, str], computed: int) -> Embedded:
    kept = [i for i in range(len(images)) if i not in unusable]
    if not kept:
        first = next(iter(unusable.values()), images.excluded[0]["reason"] if images.excluded else "none there")
        raise StageError(f"{images.folder}: no usable image; the first problem: {first}")
    excluded: list[Excluded] = [{"file": images.name(i), "reason": reason} for i, reason in unusable.items()]
    return Embedded(images.subset(kept, excluded), *cache.read([images.hashes[i] for i in kept]), computed)


def _batches(
    images: ImageSet, batches: list[list[int]], embedder: Embedder, unusable: dict[int, str]
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Prepared pixels of each batch; an image that can't be used goes into ``unusable`` with the reason."""
    for batch in batches:
        held, pixels = [], []
        for index in batch:
            try:
                pixels.append(embedder.prepare(load_rgb(images.records[index].path)))
                held.append(index)
            except ImageError as error:
                unusable[index] = str(error)
        if held:
            yield held, torch.stack(pixels)


def _check_finite(features: np.ndarray, images: ImageSet, indices: list[int], embedder: Embedder) -> None:
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if bad.size:
        path = images.records[indices[bad[0]]].path
        raise StageError(f"{path}: its {embedder.name} embedding is not finite; the weights may be damaged")


def embed(images: ImageSet, embedder: Embedder, cache_dir: str | Path, batch_size: int = 32) -> Embedded:
    """:func:`embed_images` with a progress bar."""
    desc = f"embed {images.folder.name} ({embedder.name})"
    with tqdm(total=len(images), unit="image", desc=desc, delay=2, disable=not is_main()) as bar:
        return embed_images(images, embedder, cache_dir, batch_size, bar.update)
