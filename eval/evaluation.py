"""The whole evaluation of some models: draw, embed, attack, measure, write the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eval.attacks.run import attack
from eval.checkpoints import Checkpoint, resolve_base
from eval.drawing import captions_of, generate, read_prompts
from eval.embedders.registry import Embedder
from eval.embedding import Embedded
from eval.images import ImageSet, read_folder
from eval.options import BASE, STAGES, MemorizationOptions
from eval.processes import is_main
from eval.reporting.figures import References, control_figures, make_references, sampler_figures, threshold_figures
from eval.reporting.verdict import judge, model_figures
from eval.samplers import Sampler, samplers_of
from eval.sets import Embedding, embed_sets, plant, read_sets
from sdxl_ambient.provenance import environment

SCHEMA_VERSION = 3


@dataclass
class Drawn:
    """One folder of images: with which sampler they were made, and each file's seed, where that is known."""

    folder: Path
    sampler: Sampler | None = None
    runs: dict[str, int] | None = None


def plan_models(options: MemorizationOptions) -> list[tuple[Checkpoint, list[Sampler]]]:
    """Each model with its samplers: all that can be refused before loading."""
    models = options.models()
    if not models:
        return []
    from sdxl_ambient.pipeline import first_timestep

    base = resolve_base(options.pretrained_model_name_or_path, options.revision, options.variant)
    first = first_timestep(base, options.num_inference_steps)
    return [(c, samplers_of(c, options, first)) for c in models]


def draw_all(
    options: MemorizationOptions, models: list[tuple[Checkpoint, list[Sampler]]]
) -> dict[str, tuple[dict, dict[str, Drawn]]]:
    """Every model's images: name → (what it is, sampler → folder). Draws what is missing."""
    found = {}
    if models:
        prompts = (
            read_prompts(options.prompts_file)
            if options.prompts_file
            else captions_of(options.train_data_dir, options.caption_column)
        )
    for c, samplers in models:
        folders = generate(options, c, samplers, prompts, Path(options.output_dir) / "generated" / c.name)
        about = {
            "kind": "lora" if c.lora else ("unet" if c.unet else "base"),
            "path": str(c.lora or c.unet or options.pretrained_model_name_or_path),
            "trained_t_n": c.t_n(),
            "run": c.run,
            "step": c.step,
        }
        drawn = {s.name: Drawn(folders[s.name][0], s, {d.file: d.run for d in folders[s.name][1]}) for s in samplers}
        found[c.name] = (about, drawn)
    for name, folder in options.given().items():
        about = {"kind": "images", "path": str(folder), "trained_t_n": None, "run": None, "step": None}
        found[name] = (about, {"given": Drawn(folder)})
    return found


def attack_all(
    options: MemorizationOptions, train: ImageSet, heldout: ImageSet | None, embedder: Embedder
) -> dict[str, dict]:
    """Each model's answers to the attacks; none for folders of images, or without images that were not trained on."""
    if options.skip_attacks or heldout is None:
        return {}
    folder = Path(options.output_dir) / "attacks"
    return {c.name: attack(options, c, train, heldout, embedder, folder / c.name) for c in options.models()}


def evaluate(options: MemorizationOptions) -> dict | None:
    """Run every stage and return the report; None in processes that only helped, or where ``until`` ends it before."""
    models, sets = plan_models(options), read_sets(options)
    last = STAGES.index(options.until)
    drawn = draw_all(options, models)
    if last < STAGES.index("embed"):
        return None
    embedding = Embedding(options)
    train, heldout = embed_sets(options, *sets, embedding)
    pooled = [embedding.pooled(s.images) if s else None for s in (train, heldout)]
    embedded = {name: {s: embed_drawn(d, embedding) for s, d in folders.items()} for name, (_, folders) in drawn.items()}
    if last < STAGES.index("attack"):
        return None
    answers = attack_all(options, train.images, heldout.images if heldout else None, embedding.embedder)
    if last < STAGES.index("measure") or not is_main():
        return None
    base = next(iter(embedded[BASE].values())) if BASE in embedded else None
    references = make_references(
        train,
        heldout,
        *pooled,
        options.alpha,
        options.confidence,
        options.embedder,
        plant(options, train, embedding.embedder),
        base[0] if base else None,
    )
    return _report(options, embedding, references, measure(options, drawn, embedded, answers, references))


def embed_drawn(drawn: Drawn, embedding: Embedding) -> tuple[Embedded, Embedded, dict | None]:
    """A folder's embeddings, its pooled pixels and its CLIP score."""
    images = read_folder(drawn.folder)
    clip = embedding.clip.figures(images, embedding.cache, embedding.batch_size) if embedding.clip else None
    return embedding(images), embedding.pooled(images), clip


def measure(
    options: MemorizationOptions, drawn: dict, embedded: dict, answers: dict, references: References
) -> dict[str, dict]:
    """The models' entries of the report."""
    entries = {}
    for name, (about, folders) in drawn.items():
        samplers = {}
        for sampler, one in folders.items():
            images, pooled, clip = embedded[name][sampler]
            runs = [one.runs[images.images.name(i)] for i in range(len(images))] if one.runs else None
            samplers[sampler] = {
                "folder": _relative(one.folder, options.output_dir),
                "settings": one.sampler.describe() if one.sampler else None,
                "t_n": one.sampler.t_n if one.sampler else None,
                **sampler_figures(images, pooled, references, runs, clip),
            }
        entries[name] = model_figures(samplers, about)
    judge(entries, answers, references, BASE)
    return entries


def _report(options: MemorizationOptions, embedding: Embedding, references: References, entries: dict[str, dict]) -> dict:
    return {
        "schema_version": SCHEMA_VERSION,
        "environment": environment(),
        "settings": _settings(options),
        "embedder": embedding.embedder.describe(),
        "quality_features": embedding.pooled_pixels.describe(),
        "data": {"train": _data(references.train), "heldout": _data(references.heldout)},
        "threshold": threshold_figures(references),
        "controls": control_figures(references),
        "models": entries,
    }


def _settings(options: MemorizationOptions) -> dict:
    names = (
        "preset",
        "num_inference_steps",
        "guidance_scale",
        "resolution",
        "seed",
        "num_seeds",
        "num_images",
        "images_per_prompt",
        "sampler_t_n",
        "dtype",
        "lora_scale",
        "samplers",
        "worst_case",
        "worst_case_images",
        "prompts_file",
        "near_duplicates",
        "clip_score_model",
        "max_excess",
        "attacks",
        "attack_images",
        "attack_modes",
        "attack_prompts",
        "attack_steps",
        "mask_share",
    )
    return {name: getattr(options, name) for name in names}


def _data(embedded: Embedded | None) -> dict | None:
    if embedded is None:
        return None
    images = embedded.images
    return {"folder": str(images.folder), "n_images": len(images), "excluded": images.excluded}


def _relative(folder: Path, root: str) -> str:
    """Relative to the report where it lies below it, so that the report can be moved as a whole."""
    folder, base = Path(folder).resolve(), Path(root).resolve()
    return folder.relative_to(base).as_posix() if base in folder.parents else str(folder)
