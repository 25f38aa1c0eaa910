"""How much of a fine-tuning set does a model reproduce? Runs the stages in order; a second run redoes nothing.

python -m eval.memorization --pretrained_model_name_or_path BASE --lora [NAME=]PATH … --train_data_dir DIR
    --heldout_data_dir DIR --output_dir OUT [--samplers full hybrid] [--sampler_t_n 500]
python -m eval.memorization --pretrained_model_name_or_path BASE --checkpoints RUN …      every checkpoint-* of a run
python -m eval.memorization --generated_dir [NAME=]DIR … --train_data_dir DIR --heldout_data_dir DIR --output_dir OUT

OUT gets generated/MODEL/SAMPLER/, embeddings/, attacks/, controls.json, report.json and index.html. Under accelerate launch
or torchrun, drawing, embedding and attacks are shared over the processes.
Exit codes: 0 within the budget (or none given), 1 over the memorisation budget (--max_excess), 2 error, 3 too few control
images to calibrate (the report then has descriptive figures only).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eval.attack import attack
from eval.checkpoints import Checkpoint, model_errors, resolve_base, resolve_device
from eval.clip import ClipScore
from eval.controls import MOST, TRANSFORMS, planted, recompressed, vae_round_trip
from eval.duplicates import Fingerprints, drop_near_duplicates, drop_near_embeddings, jpeg_limit
from eval.embed import Embedded, embed
from eval.embedders import Embedder, load_embedder
from eval.generate import captions_of, generate, open_vae, read_prompts
from eval.images import ImageSet, StageError, drop_duplicates, read_folder
from eval.options import BASE, STAGES, Options
from eval.processes import is_main
from eval.report import write_html
from eval.samplers import Sampler, samplers_of
from eval.summary import FRECHET_MOST, References, control_figures, make_references, sampler_figures, threshold_figures
from eval.verdict import judge, model_figures, over_budget
from sdxl_ambient.config import OptionError, parse_options
from sdxl_ambient.images import ImagesMissing
from sdxl_ambient.manifest import environment, hash_tensors, read_json, write_json

SCHEMA_VERSION = 3


@dataclass
class Drawn:
    """One folder of images: with which sampler they were made, and each file's seed, where that is known."""

    folder: Path
    sampler: Sampler | None = None
    runs: dict[str, int] | None = None


# -- stages ------------------------------------------------------------------------


def plan_models(options: Options) -> list[tuple[Checkpoint, list[Sampler]]]:
    """Each model with its samplers: all that can be refused before loading."""
    models = options.models()
    if not models:
        return []
    from sdxl_ambient.pipeline import first_timestep

    base = resolve_base(options.pretrained_model_name_or_path, options.revision, options.variant)
    first = first_timestep(base, options.num_inference_steps)
    return [(c, samplers_of(c, options, first)) for c in models]


def draw_all(options: Options, models: list[tuple[Checkpoint, list[Sampler]]]) -> dict[str, tuple[dict, dict[str, Drawn]]]:
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


class Embedding:
    """The embedders of a run and their cache."""

    def __init__(self, options: Options):
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


def read_sets(options: Options) -> tuple[ImageSet, ImageSet | None]:
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
    options: Options, train: ImageSet, heldout: ImageSet | None, embedding: Embedding
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


def attack_all(options: Options, train: ImageSet, heldout: ImageSet | None, embedder: Embedder) -> dict[str, dict]:
    """Each model's answers to the attacks; none for folders of images, or without images that were not trained on."""
    if options.skip_attacks or heldout is None:
        return {}
    folder = Path(options.output_dir) / "attacks"
    return {c.name: attack(options, c, train, heldout, embedder, folder / c.name) for c in options.models()}


def plant(options: Options, train: Embedded, embedder: Embedder) -> dict[str, np.ndarray]:
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


# -- all of it ---------------------------------------------------------------------


def evaluate(options: Options) -> dict | None:
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


def measure(options: Options, drawn: dict, embedded: dict, answers: dict, references: References) -> dict[str, dict]:
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


def _report(options: Options, embedding: Embedding, references: References, entries: dict[str, dict]) -> dict:
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


def _settings(options: Options) -> dict:
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


def main(argv: list[str] | None = None) -> int:
    options = parse_options(Options, argv, prog="eval.memorization", description=__doc__)
    is_main()  # gives each process its GPU, before anything is loaded
    try:
        report = evaluate(options)
        if report is None:
            return 0
        write_json(Path(options.output_dir) / "report.json", report)
        page = write_html(report, options.output_dir)
    except (OptionError, StageError, ImagesMissing, OSError, *model_errors()) as error:
        print(f"eval.memorization: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for name, model in report["models"].items():
        print(f"{name}: {model['verdict']['text']}")
    print(page)
    if report["threshold"]["value"] is None:
        return 3
    over = [n for n, m in report["models"].items() if options.max_excess is not None and over_budget(m, options.max_excess)]
    over = [n for n in over if n != BASE]  # the base model is a control
    if over:
        print(f"Over the budget of {options.max_excess:.1%} copies: {', '.join(over)}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
