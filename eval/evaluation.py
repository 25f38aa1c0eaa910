"""The whole evaluation of some models: draw, embed, attack, measure, write the report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.attacks.membership import Scores
from eval.attacks.run import attack
from eval.attacks.settings import AttackSettings
from eval.checkpoints import Checkpoint
from eval.choices import BASE, STAGES
from eval.drawing import base_folder, captions_of, generate, read_prompts
from eval.embedders.registry import Embedder
from eval.embedding import Embedded
from eval.found import KnownPictures
from eval.images import ImageSet, read_folder
from eval.parts import Parts
from eval.processes import is_main
from eval.reporting.controls import control_figures
from eval.reporting.folder import folder_figures
from eval.reporting.parts import look_for_parts
from eval.reporting.references import References, ReferenceSets, make_references, threshold_figures
from eval.reporting.verdict import judge, model_figures
from eval.samplers import Sampler, SamplerSettings, samplers_of
from eval.schema import (
    SCHEMA_VERSION,
    ClipFigures,
    DataFigures,
    FoundCopy,
    ModelFigures,
    ModelIdentity,
    Report,
    SamplerFigures,
)
from eval.sets import (
    Embedding,
    SetSettings,
    embed_sets,
    in_the_shape,
    known_pictures,
    plant,
    read_sets,
    sampled_embedder,
    seen_otherwise,
)
from eval.statistics.calibrate import smallest_null
from eval.views import aspect_of
from sdxl_ambient.errors import StageError
from sdxl_ambient.images.duplicates import Fingerprints
from sdxl_ambient.pipeline import first_timestep
from sdxl_ambient.provenance import environment


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated, and how.

    models: those that images are drawn from, the base model first where it is a control. given: folders of images that are
        there already, by name.
    attack: how the models are attacked and, since that is the same, how images are drawn; ``attacks`` says whether at all.
    recorded: options as the report repeats them.
    alpha, confidence, local_copies, until, prompts_file: values of the options of these names.
    """

    sets: SetSettings
    samplers: SamplerSettings
    attack: AttackSettings
    attacks: bool
    models: list[Checkpoint]
    given: dict[str, Path]
    prompts_file: str | None
    alpha: float
    confidence: float
    local_copies: str
    until: str
    recorded: dict[str, Any]

    @property
    def output(self) -> Path:
        """The folder that everything is written to."""
        return Path(self.sets.output_dir)


@dataclass
class Drawn:
    """One folder of images: with which sampler they were made, and each file's seed, where that is known."""

    folder: Path
    sampler: Sampler | None = None
    runs: dict[str, int] | None = None


@dataclass
class DrawnModel:
    """A model, and its folders of images by sampler."""

    identity: ModelIdentity
    folders: dict[str, Drawn]


@dataclass
class EmbeddedFolder:
    """A folder's embeddings, its pooled pixels and its CLIP score."""

    images: Embedded
    pooled: Embedded
    clip: ClipFigures | None
    found: dict[str, FoundCopy]


def plan_models(settings: EvaluationSettings) -> list[tuple[Checkpoint, list[Sampler]]]:
    """Each model with its samplers: all that can be refused before loading."""
    if not settings.models:
        return []
    first = first_timestep(base_folder(settings.attack), settings.attack.num_inference_steps)
    return [(c, samplers_of(c, settings.samplers, first)) for c in settings.models]


def draw_all(settings: EvaluationSettings, models: list[tuple[Checkpoint, list[Sampler]]]) -> dict[str, DrawnModel]:
    """Every model's images, by its name. Draws what is missing."""
    drawn: dict[str, DrawnModel] = {}
    prompts = _prompts(settings) if models else []
    for c, samplers in models:
        folders = generate(settings.attack, c, samplers, prompts, settings.output / "generated" / c.name)
        identity: ModelIdentity = {
            "kind": "lora" if c.lora else ("unet" if c.unet else "base"),
            "path": str(c.lora or c.unet or settings.attack.pretrained_model_name_or_path),
            "trained_t_n": c.t_n(),
            "run": c.run,
            "step": c.step,
        }
        by_sampler = {s.name: Drawn(folders[s.name][0], s, {d.file: d.run for d in folders[s.name][1]}) for s in samplers}
        drawn[c.name] = DrawnModel(identity, by_sampler)
    for name, folder in settings.given.items():
        identity = {"kind": "images", "path": str(folder), "trained_t_n": None, "run": None, "step": None}
        drawn[name] = DrawnModel(identity, {"given": Drawn(folder)})
    return drawn


def _prompts(settings: EvaluationSettings) -> list[str]:
    if settings.prompts_file:
        return read_prompts(settings.prompts_file)
    return captions_of(settings.sets.train_data_dir, settings.sets.columns)


def attack_all(
    settings: EvaluationSettings, train: ImageSet, heldout: ImageSet | None, embedder: Embedder
) -> dict[str, dict[str, Scores]]:
    """Each model's scores of the attacks; none for folders of images, or without images that were not trained on."""
    if not settings.attacks or heldout is None:
        return {}
    folder = settings.output / "attacks"
    return {c.name: attack(settings.attack, c, train, heldout, embedder, folder / c.name) for c in settings.models}


def evaluate(settings: EvaluationSettings) -> Report | None:
    """Run every stage and return the report; None in processes that only helped, or where ``until`` ends it before."""
    models, image_sets = plan_models(settings), read_sets(settings.sets)
    last = STAGES.index(settings.until)
    if last < STAGES.index("embed"):
        draw_all(settings, models)
        return None
    # Before anything is drawn, for hours perhaps: weights that can't be loaded, and sets from which nothing can follow.
    embedding = Embedding(settings.sets)
    train, heldout = embed_sets(settings.sets, *image_sets, embedding)
    if models:
        check_sizes(settings, heldout)
    drawn = draw_all(settings, models)
    known = known_pictures(*image_sets, embedding)
    embedded = {
        name: {s: embed_drawn(d, embedding, settings.sets, known) for s, d in m.folders.items()} for name, m in drawn.items()
    }
    aspect = aspect_of(folder.images.images for by_sampler in embedded.values() for folder in by_sampler.values())
    sets = ReferenceSets(
        train,
        heldout,
        embedding.pooled(train.images),
        embedding.pooled(heldout.images) if heldout else None,
        views=seen_otherwise(train.images, embedding, aspect),
        as_sampled=in_the_shape(heldout, embedding, aspect),
    )
    if last < STAGES.index("attack"):
        return None
    scores = attack_all(settings, train.images, heldout.images if heldout else None, embedding.embedder)
    if last < STAGES.index("measure") or not is_main():
        return None
    base = next(iter(embedded[BASE].values())) if BASE in embedded else None
    as_drawn = sampled_embedder(embedding.embedder, aspect)
    planted = plant(settings.sets, settings.attack, train, as_drawn, sets.nearest_in_train, list(sets.views))
    base_images, name = base.images if base else None, settings.sets.embedder
    references = make_references(sets, settings.alpha, settings.confidence, name, planted, base_images, known)
    references.parts = find_parts(settings, references, embedded)
    return _report(settings, embedding, references, measure(settings, drawn, embedded, scores, references))


def find_parts(
    settings: EvaluationSettings, references: References, embedded: dict[str, dict[str, EmbeddedFolder]]
) -> Parts | None:
    """Copies of a part among the images that similarity and fingerprints don't find; None where they aren't wanted."""
    if settings.local_copies == "off":
        return None
    folders = [folder for by_sampler in embedded.values() for folder in by_sampler.values()]
    rows = [_unfound(folder, references) for folder in folders]
    images = [folder.images.images for folder in folders]
    return look_for_parts(references, images, rows, settings.output / "local_copies.json")


def _unfound(folder: EmbeddedFolder, references: References) -> np.ndarray:
    """Rows of images that are no copies as far as similarity and fingerprints go."""
    images = folder.images
    unfound = np.array([images.images.name(i) not in folder.found for i in range(len(images))])
    if references.threshold is not None:
        unfound &= references.nearest_in_train(images.embeddings)[0] <= references.threshold
    return np.flatnonzero(unfound)


def check_sizes(settings: EvaluationSettings, heldout: Embedded | None) -> None:
    """Raises StageError where the held-out images are too few for a verdict, before anything is drawn for one."""
    needed = smallest_null(settings.alpha)
    if heldout is not None and len(heldout) < needed:
        alpha = 1 / (len(heldout) + 1)
        raise StageError(
            f"--heldout_data_dir: {len(heldout)} images, without repeated ones, are too few for a threshold that "
            f"{settings.alpha:g} of unrelated images exceed (--alpha): at least {needed} are needed. Give more, or "
            f"--alpha {math.ceil(alpha * 1000) / 1000:g} or more"
        )


def embed_drawn(drawn: Drawn, embedding: Embedding, settings: SetSettings, known: KnownPictures) -> EmbeddedFolder:
    """What is measured of a folder, from the cache where it is there."""
    images = read_folder(drawn.folder, settings.columns_of(given=drawn.sampler is None))
    clip = embedding.clip.figures(images, embedding.cache, embedding.batch_size) if embedding.clip else None
    prints = embedding(images, embedding.fingerprint)
    found = known.find(prints.images, Fingerprints.of(prints.features))
    return EmbeddedFolder(embedding(images), embedding.pooled(images), clip, found)


def measure(
    settings: EvaluationSettings,
    drawn: dict[str, DrawnModel],
    embedded: dict[str, dict[str, EmbeddedFolder]],
    scores: dict[str, dict[str, Scores]],
    references: References,
) -> dict[str, ModelFigures]:
    """The models' entries of the report."""
    entries: dict[str, ModelFigures] = {}
    for name, model in drawn.items():
        samplers: dict[str, SamplerFigures] = {}
        for sampler, folder in model.folders.items():
            measured = embedded[name][sampler]
            images = measured.images
            runs = [folder.runs[images.images.name(i)] for i in range(len(images))] if folder.runs else None
            samplers[sampler] = {
                "folder": _relative(folder.folder, settings.output),
                "settings": folder.sampler.describe() if folder.sampler else None,
                "t_n": folder.sampler.t_n if folder.sampler else None,
                **folder_figures(images, measured.pooled, references, runs, measured.clip, measured.found),
                "difference_to_base": None,
            }
        entries[name] = model_figures(samplers, model.identity)
    judge(entries, scores, references, BASE)
    return entries


def _report(
    settings: EvaluationSettings, embedding: Embedding, references: References, entries: dict[str, ModelFigures]
) -> Report:
    return {
        "schema_version": SCHEMA_VERSION,
        "environment": environment(),
        "settings": settings.recorded,
        "embedder": embedding.embedder.describe(),
        "quality_features": embedding.pooled_pixels.describe(),
        "data": {
            "train": _data(references.train),
            "heldout": _data(references.heldout) if references.heldout else None,
        },
        "threshold": threshold_figures(references),
        "controls": control_figures(references),
        "models": entries,
    }


def _data(embedded: Embedded) -> DataFigures:
    images = embedded.images
    return {"folder": str(images.folder), "n_images": len(images), "excluded": images.excluded, "ledger": images.record()}


def _relative(folder: Path, root: Path) -> str:
    """Relative to the report where it lies below it, so that the report can be moved as a whole."""
    folder, base = folder.resolve(), root.resolve()
    return folder.relative_to(base).as_posix() if base in folder.parents else str(folder)
