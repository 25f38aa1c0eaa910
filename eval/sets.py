"""The sets that are compared: images of training, held-out and controls, read and embedded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
from eval.quality import FRECHET_MOST
from eval.stored import arrays, read_object
from sdxl_ambient.devices import resolve_device
from sdxl_ambient.errors import StageError
from sdxl_ambient.images.duplicates import Fingerprints
from sdxl_ambient.provenance import hash_tensors, write_sealed


def output_folder(options: MemorizationOptions) -> Path:
    """The folder that everything is written to."""
    assert options.output_dir is not None, "the options' own check asks for it"
    return Path(options.output_dir)


def train_folder(options: MemorizationOptions) -> Path:
    """The folder of the fine-tuning set."""
    assert options.train_data_dir is not None, "the options' own check asks for it"
    return Path(options.train_data_dir)


class Embedding:
    """The embedders of a run and their cache."""

    def __init__(self, options: MemorizationOptions):
        self.device = resolve_device(options.device)
        self.cache, self.batch_size = output_folder(options) / "embeddings", options.embedding_batch_size
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
    train = drop_duplicates(read_folder(train_folder(options), options.caption_column))
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
        train, heldout = _without_same_hashes(train, heldout, embedding)
    embedded_train, embedded_heldout = embedding(train), embedding(heldout) if heldout else None
    if options.near_duplicates == "drop":
        return _without_near_embeddings(embedded_train, embedded_heldout, embedding)
    return embedded_train, embedded_heldout


def _without_same_hashes(
    train: ImageSet, heldout: ImageSet | None, embedding: Embedding
) -> tuple[ImageSet, ImageSet | None]:
    """Both sets without the images whose perceptual hashes are those of an earlier one."""
    prints = embedding(train, embedding.fingerprint)
    hashes = Fingerprints.of(prints.features)
    if heldout:
        heldout_prints = embedding(heldout, embedding.fingerprint)
        own = Fingerprints.of(heldout_prints.features)
        heldout = drop_near_duplicates(heldout_prints.images, own, prints.images, hashes)
        _check_left(heldout)
    return drop_near_duplicates(prints.images, hashes), heldout


def _without_near_embeddings(
    train: Embedded, heldout: Embedded | None, embedding: Embedding
) -> tuple[Embedded, Embedded | None]:
    """Both sets without the images that the embedder finds as near to an earlier one as a JPEG copy."""
    least = jpeg_limit(recompressed(train, embedding.embedder, embedding.batch_size))
    if heldout:
        kept = drop_near_embeddings(heldout.images, heldout.embeddings, least, train.images, train.embeddings)
        _check_left(kept)
        heldout = heldout.only(kept)
    return train.only(drop_near_embeddings(train.images, train.embeddings, least)), heldout


def plant(options: MemorizationOptions, train: Embedded, embedder: Embedder) -> dict[str, np.ndarray]:
    """Similarities of known copies of training images; through the model's VAE too, where there is a model.

    Kept in ``controls.json`` for the next run of the same settings.
    """
    transforms = dict(TRANSFORMS)
    settings: dict[str, Any] = {"embedder": embedder.key, "train": train.images.hashes, "most": MOST, "vae": None}
    if options.pretrained_model_name_or_path is not None:
        vae, resolution = open_vae(options)
        transforms["vae"] = vae_round_trip(vae, resolution)
        settings["vae"] = {"weights": hash_tensors(vae.state_dict()), "resolution": resolution}
    path = output_folder(options) / "controls.json"
    if (stored := _stored_controls(path, settings, transforms, min(len(train), MOST))) is not None:
        return stored
    with tqdm(total=min(len(train), MOST), unit="image", desc="plant copies", delay=2) as bar:
        similarities = planted(train, embedder, transforms, options.embedding_batch_size, bar.update)
    write_sealed(path, {"settings": settings, "planted": {name: values.tolist() for name, values in similarities.items()}})
    return similarities


def _stored_controls(path: Path, settings: dict, names: Iterable[str], count: int) -> dict[str, np.ndarray] | None:
    """The controls that an earlier run of the same settings left; None where there are none. A damaged file is passed over.

    Args:
        names: of the transforms; all must be there.
        count: of the images that each was made of.
    """
    if not path.exists():
        return None
    try:
        stored = read_object(path, ["settings", "planted"], "it is computed anew")
        if stored["settings"] != settings:
            return None
        planted = arrays(stored["planted"], path, "it is computed anew", [count])
        if planted.keys() != set(names):
            raise StageError(f"{path} is damaged: it holds other controls than {', '.join(names)}; it is computed anew")
    except StageError as error:
        tqdm.write(f"passed over: {error}")
        return None
    return {name: values.astype(np.float32) for name, values in planted.items()}
