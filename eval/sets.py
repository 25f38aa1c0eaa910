"""The sets that are compared: images of training, held-out and controls, read and embedded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from eval.clip import ClipScore
from eval.controls import MOST, TRANSFORMS, NearestInTrain, planted, recompressed, vae_round_trip
from eval.drawing import GenerationSettings, open_vae
from eval.duplicates import drop_near_duplicates, drop_near_embeddings, jpeg_limit
from eval.embedders.registry import Embedder, load_embedder
from eval.embedding import Embedded, embed
from eval.found import KnownPictures
from eval.images import ImageSet, drop_duplicates, read_folder
from eval.processes import is_main
from eval.quality import FRECHET_MOST
from eval.stored import arrays, read_object
from eval.views import VIEWS, Transform, differs, fit, through
from sdxl_ambient.devices import resolve_device
from sdxl_ambient.errors import OptionError, StageError
from sdxl_ambient.images.captions import Columns
from sdxl_ambient.images.duplicates import Fingerprints, matching
from sdxl_ambient.provenance import hash_tensors, write_sealed


@dataclass(frozen=True)
class SetSettings:
    """The sets, and what they are compared by. Values of the settings of these names."""

    train_data_dir: str
    heldout_data_dir: str | None
    caption_column: str
    caption_encoding: str | None
    output_dir: str
    embedder: str
    embedder_weights: str | None
    embedding_batch_size: int
    clip_score_model: str | None
    near_duplicates: str
    device: str

    @property
    def columns(self) -> Columns:
        """Where captions are."""
        return Columns(self.caption_column, encoding=self.caption_encoding)

    def columns_of(self, given: bool) -> Columns:
        """Where the captions of generated images are, which need none: of those that were ``given``, or of our own."""
        own = Columns(captions_needed=False)
        return replace(self.columns, captions_needed=False) if given else own


def check_set_folders(train_data_dir: str, heldout_data_dir: str | None, output_dir: str) -> None:
    """Raises OptionError where nothing is held out, or results would be read as data, or can't be written."""
    train, out = Path(train_data_dir).resolve(), Path(output_dir).resolve()
    heldout = Path(heldout_data_dir).resolve() if heldout_data_dir else None
    if train == heldout:
        raise OptionError(f"--heldout_data_dir: {heldout_data_dir!r} is the training set; nothing is held out")
    for name, folder in [("train_data_dir", train), ("heldout_data_dir", heldout)]:
        if folder and (out == folder or folder in out.parents):
            # Generated images would be read as data the next time.
            raise OptionError(f"--output_dir: {output_dir!r} lies inside --{name}; give a folder outside it")
    existing = next(p for p in (out, *out.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OptionError(f"--output_dir: {output_dir!r} can't be written to ({existing} is not a writable folder)")


class Embedding:
    """The embedders of a run and their cache."""

    def __init__(self, settings: SetSettings):
        self.device = resolve_device(settings.device)
        self.cache, self.batch_size = Path(settings.output_dir) / "embeddings", settings.embedding_batch_size
        self.embedder = load_embedder(settings.embedder, settings.embedder_weights, self.device)
        self.pooled_pixels, self.fingerprint = load_embedder("pooled_pixels"), load_embedder("fingerprint")
        self.clip = ClipScore(settings.clip_score_model, self.device) if settings.clip_score_model else None

    def __call__(self, images: ImageSet, embedder: Embedder | None = None) -> Embedded:
        return embed(images, embedder or self.embedder, self.cache, self.batch_size)

    def pooled(self, images: ImageSet) -> Embedded:
        """Pooled pixels of at most as many images as a Fréchet distance is taken of."""
        return self(images.thinned(FRECHET_MOST), self.pooled_pixels)


def read_sets(settings: SetSettings) -> tuple[ImageSet, ImageSet | None]:
    """The fine-tuning and the held-out set, without files that come twice."""
    train = drop_duplicates(_read(settings, settings.train_data_dir))
    if settings.heldout_data_dir is None:
        return train, None
    heldout = drop_duplicates(drop_duplicates(_read(settings, settings.heldout_data_dir)), train)
    _check_left(heldout)
    return train, heldout


def _read(settings: SetSettings, folder: str) -> ImageSet:
    """A folder's images; the first process tells what became of every file."""
    images = read_folder(folder, settings.columns)
    if is_main():
        for line in images.ledger.lines(folder):
            print(line)
    return images


def _check_left(heldout: ImageSet) -> None:
    if not len(heldout):
        raise StageError(f"--heldout_data_dir: every image of {str(heldout.folder)!r} is in the training set too")


def embed_sets(
    settings: SetSettings, train: ImageSet, heldout: ImageSet | None, embedding: Embedding
) -> tuple[Embedded, Embedded | None]:
    """Both sets' embeddings, without near-duplicates: by perceptual hash, then by the embedder."""
    if settings.near_duplicates == "drop":
        train, heldout = _without_same_hashes(train, heldout, embedding)
    embedded_train, embedded_heldout = embedding(train), embedding(heldout) if heldout else None
    if settings.near_duplicates == "drop":
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


def known_pictures(train: ImageSet, heldout: ImageSet | None, embedding: Embedding) -> KnownPictures:
    """The training pictures by bytes and fingerprint, near-duplicates too, and how many held-out ones show one."""
    prints = embedding(train, embedding.fingerprint)
    hashes = Fingerprints.of(prints.features)
    if heldout is None:
        return KnownPictures(train, prints.images, hashes)
    own = Fingerprints.of(embedding(heldout, embedding.fingerprint).features)
    return KnownPictures(train, prints.images, hashes, sum(1 for _ in matching(own, hashes)), len(own.hashes))


def seen_otherwise(train: ImageSet, embedding: Embedding, aspect: float) -> dict[str, np.ndarray]:
    """Embeddings of the training images seen in other ways, in their order; of another shape than the samples' cropped too.

    Args:
        aspect: width by height of the samples.
    """
    views: dict[str, tuple[Transform, ...]] = {name: (view,) for name, view in VIEWS.items()}
    if differs(train, aspect):
        crop = partial(fit, aspect=aspect)
        views |= {"as sampled": (crop,), **{f"as sampled, {name}": (crop, view) for name, view in VIEWS.items()}}
    return {
        name: embedding(train, through(embedding.embedder, _named(name, aspect), *transforms)).embeddings
        for name, transforms in views.items()
    }


def in_the_shape(images: Embedded | None, embedding: Embedding, aspect: float) -> Embedded | None:
    """Held-out images as the sampler would crop them; None where they have its shape."""
    if images is None or not differs(images.images, aspect):
        return None
    return embedding(images.images, sampled_embedder(embedding.embedder, aspect))


def sampled_embedder(embedder: Embedder, aspect: float) -> Embedder:
    """The embedder of pictures that are cropped to the samples' shape first."""
    return through(embedder, _named("as sampled", aspect), partial(fit, aspect=aspect))


def _named(view: str, aspect: float) -> str:
    return f"{view} ({aspect:.3f})" if "as sampled" in view else view


def plant(
    settings: SetSettings,
    generation: GenerationSettings,
    train: Embedded,
    embedder: Embedder,
    nearest_in_train: NearestInTrain | None = None,
    views: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Similarities of known copies of training images; through the model's VAE too, where there is a model.

    Kept in ``controls.json`` for the next run of the same settings.

    Args:
        embedder: as samples are embedded. nearest_in_train: see :func:`eval.controls.planted`. views: its names.
    """
    transforms = dict(TRANSFORMS)
    recorded: dict[str, Any] = {"embedder": embedder.key, "train": train.images.hashes, "most": MOST, "vae": None}
    recorded["views"] = list(views)
    if generation.pretrained_model_name_or_path is not None:
        vae, resolution = open_vae(generation)
        transforms["vae"] = vae_round_trip(vae, resolution)
        recorded["vae"] = {"weights": hash_tensors(vae.state_dict()), "resolution": resolution}
    path = Path(settings.output_dir) / "controls.json"
    if (stored := _stored_controls(path, recorded, transforms, min(len(train), MOST))) is not None:
        return stored
    with tqdm(total=min(len(train), MOST), unit="image", desc="plant copies", delay=2) as bar:
        batch = settings.embedding_batch_size
        similarities = planted(train, embedder, transforms, batch, bar.update, nearest_in_train)
    write_sealed(path, {"settings": recorded, "planted": {name: values.tolist() for name, values in similarities.items()}})
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
