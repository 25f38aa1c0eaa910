"""The sets that are compared: images of training, held-out and controls, read and embedded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from eval.clip import ClipScore
from eval.controls import MOST, TRANSFORMS, planted, recompressed, vae_round_trip
from eval.drawing import open_vae
from eval.duplicates import drop_near_duplicates, drop_near_embeddings, jpeg_limit
from eval.embedders.registry import Embedder, load_embedder
from eval.embedding import Embedded, embed
from eval.images import ImageSet, drop_duplicates, read_folder
from eval.options import MemorizationOptions
from eval.reporting.figures import FRECHET_MOST
from sdxl_ambient.devices import resolve_device
from sdxl_ambient.errors import StageError
from sdxl_ambient.images.duplicates import Fingerprints
from sdxl_ambient.provenance import hash_tensors, read_json, write_json


class Embedding:
    """The embedders of a run and their cache."""

    def __init__(self, options: MemorizationOptions):
        self.device = resolve_device(options.device)
        self.cache, self.batch_size = Path(options.output_dir) / "embeddings", options.embedding_batch_size
        self.embedder = load_embedder(options.embedder, options.embedder_weights, self.device)
        self.pooled_pixels, self.fingerprint = load_embedder("pooled_pixels"), load_embedder("fingerprint")
        self.clip = ClipScore(options.clip_score_model, self.device) if options.clip_score_model else None

    def __call__(self, images: ImageSet, embedder: Embedder | None = None) -> Embedded:
        return embed(images, embedder or self.embedder, self.cache, self.batch_size)

    def pooled(self, images: ImageSet) -> Embedded:
        """Pooled pixels of at most as many images as a Fréchet distance is taken of."""
        return self(images.thinned(FRECHET_MOST), self.pooled_pixels)


def read_sets(options: MemorizationOptions) -> tuple[ImageSet, ImageSet | None]:
    """The fine-tuning and the held-out set, without files that come twice."""
    train = drop_duplicates(read_folder(options.train_data_dir, options.caption_column))
    if options.heldout_data_dir is None:
        return train, None
    heldout = drop_duplicates(drop_duplicates(read_folder(options.heldout_data_dir, options.caption_column)), train)
    _check_left(heldout)
    return train, heldout


def _check_left(heldout: ImageSet) -> None:
    if not len(heldout):
        raise StageError(f"--heldout_data_dir: every image of {str(heldout.folder)!r} is in the training set too")


def embed_sets(
    options: MemorizationOptions, train: ImageSet, heldout: ImageSet | None, embedding: Embedding
) -> tuple[Embedded, Embedded | None]:
    """Both sets' embeddings, without near-duplicates: by perceptual hash, then by the embedder."""
    if options.near_duplicates == "drop":
        prints = [embedding(s, embedding.fingerprint) if s else None for s in (train, heldout)]
        hashes = [Fingerprints.of(p.features) if p else None for p in prints]
        if heldout:
            heldout = drop_near_duplicates(prints[1].images, hashes[1], prints[0].images, hashes[0])
            _check_left(heldout)
        train = drop_near_duplicates(prints[0].images, hashes[0])
    train, heldout = embedding(train), embedding(heldout) if heldout else None
    if options.near_duplicates == "drop":
        least = jpeg_limit(recompressed(train, embedding.embedder, options.embedding_batch_size))
        if heldout:
            kept = drop_near_embeddings(heldout.images, heldout.embeddings, least, train.images, train.embeddings)
            _check_left(kept)
            heldout = heldout.only(kept)
        train = train.only(drop_near_embeddings(train.images, train.embeddings, least))
    return train, heldout


def plant(options: MemorizationOptions, train: Embedded, embedder: Embedder) -> dict[str, np.ndarray]:
    """Similarities of known copies of training images; through the model's VAE too, where there is a model.

    Kept in ``controls.json`` for the next run that asks the same.
    """
    transforms, asked = dict(TRANSFORMS), {"embedder": embedder.key, "train": train.images.hashes, "most": MOST, "vae": None}
    if options.pretrained_model_name_or_path is not None:
        vae, resolution = open_vae(options)
        transforms["vae"] = vae_round_trip(vae, resolution)
        asked["vae"] = {"weights": hash_tensors(vae.state_dict()), "resolution": resolution}
    path = Path(options.output_dir) / "controls.json"
    if path.exists() and (there := read_json(path))["settings"] == asked:
        return {name: np.array(values, dtype=np.float32) for name, values in there["planted"].items()}
    with tqdm(total=min(len(train), MOST), unit="image", desc="plant copies", delay=2) as bar:
        found = planted(train, embedder, transforms, options.embedding_batch_size, bar.update)
    write_json(path, {"settings": asked, "planted": {name: values.tolist() for name, values in found.items()}})
    return found
