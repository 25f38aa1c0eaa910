"""One cell of the study: train it, draw from it, attack it, and write what was measured as one JSON."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.private_training import train_dp_lora
from benchmarks.record import ROOT, environment_of_run
from benchmarks.script import train_here
from benchmarks.study.grid import COMMON, Cell
from eval.attacks.membership import attack_figures
from eval.attacks.run import attack
from eval.attacks.settings import AttackSettings
from eval.checkpoints import Checkpoint
from eval.choices import ALPHA, CONFIDENCE
from eval.drawing import captions_of, generate
from eval.images import read_folder
from eval.quality import frechet_distance
from eval.reporting.folder import folder_figures
from eval.reporting.references import References, ReferenceSets, make_references, threshold_figures
from eval.samplers import Sampler
from eval.sets import Embedding, SetSettings, embed_sets, plant, read_sets
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.models.base import load_schedule
from sdxl_ambient.models.load import load_encoders
from sdxl_ambient.provenance import read_json, write_json
from sdxl_ambient.store.build import build_store
from sdxl_ambient.store.settings import StoreSettings
from sdxl_ambient.training.validation import HELDOUT_FILE

GUIDANCE, SAMPLING_STEPS, IMAGES = 2.0, 15, 64
ATTACK_LEVELS = (100, 500, 800, 900)  # of the paper's table of errors
KEPT = (
    "n_generated", "share_above_threshold", "interval", "excess_over_heldout", "excess_interval", "copied_share", "authpct",
    "c_t", "mann_whitney_z", "fd_pixels", "fd_embedding", "kid", "prdc", "vendi",
)  # fmt: skip


@dataclass(frozen=True)
class Folders:
    """``data`` has the sets of :mod:`benchmarks.study.data`, ``work`` gets stores, adapters and images, ``results`` one JSON
    per cell."""

    data: Path
    work: Path
    results: Path

    def train(self, size: int) -> Path:
        return self.data / f"train_{size}"

    @property
    def heldout(self) -> Path:
        return self.data / "heldout"

    @property
    def tuning(self) -> Path:
        """Held-out pictures that a run may look at; the evaluation has others."""
        return self.data / "tuning"

    def result(self, cell: Cell) -> Path:
        return self.results / f"{cell.name}.json"


# -- training ------------------------------------------------------------------------


def flags(cell: Cell, folders: Folders, output: Path) -> list[str]:
    """The training script's arguments."""
    arguments = {
        **cell.flags,
        **({"t_n": cell.t_n} if cell.recipe.noisy else {}),
        **({"heldout_data_dir": folders.tuning} if cell.recipe.tuned else {}),
        "train_data_dir": folders.train(cell.size),
        "checkpointing_steps": min(cell.lengths),
        "checkpoints_total_limit": len(cell.lengths) + 1,
        "seed": cell.seed,
        "output_dir": output,
        "resume_from_checkpoint": "latest",
    }
    arguments["pretrained_model_name_or_path"] = ROOT / arguments["pretrained_model_name_or_path"]
    return [part for name, value in arguments.items() for part in (f"--{name}", str(value))]


def train(cell: Cell, folders: Folders) -> tuple[Mapping[int, Path | None], dict]:
    """The adapters by their steps (None: the base model), and what training cost.

    Raises:
        InterruptedError: training was told to stop. RuntimeError: it failed, with a line of its own on stderr.
    """
    output = folders.work / "runs" / cell.name
    if cell.recipe.trainer == "none":
        return {0: None}, {"cpu_seconds": 0.0, "steps": 0}
    if cell.recipe.trainer == "dp":
        return _train_privately(cell, folders, output)
    resumed = any(output.glob("checkpoint-*"))  # an earlier part was paid for then
    started, wall = time.process_time(), time.perf_counter()
    code = train_here(flags(cell, folders, output))
    if code:
        raise InterruptedError(cell.name) if code > 128 else RuntimeError(f"{cell.name}: training ended with {code}")
    cost = {"cpu_seconds": time.process_time() - started, "wall_seconds": time.perf_counter() - wall}
    *earlier, last = cell.lengths
    cost |= {"steps": last, "resumed": resumed}
    if cell.recipe.tuned:
        found = read_json(output / HELDOUT_FILE)
        return {last: output / "best"}, {**cost, "steps": found["losses"][-1]["step"], "kept_step": found["best"][0]}
    return {s: output / f"checkpoint-{s}" for s in earlier} | {last: output}, cost


def _train_privately(cell: Cell, folders: Folders, output: Path) -> tuple[dict[int, Path], dict]:
    base = ROOT / COMMON["pretrained_model_name_or_path"]
    store = output / "latents"
    settings = {**cell.flags, "batch_size": min(cell.size, cell.flags["batch_size"])}  # no batch is larger than the set
    build_store(
        folders.train(cell.size), store, load_encoders(str(base)), load_schedule(str(base)),
        StoreSettings(Geometry(64), t_n=None), log=lambda message: None,
    )  # fmt: skip
    cost = train_dp_lora(base, store, output, seed=cell.seed, **settings)
    return {cell.lengths[-1]: output}, cost


# -- measuring -----------------------------------------------------------------------


@dataclass
class Evaluation:
    """The controls of one fine-tuning set: made once in each worker."""

    sets: SetSettings
    attack: AttackSettings
    embedding: Embedding
    references: References

    @staticmethod
    @functools.cache
    def of(folders: Folders, size: int) -> Evaluation:
        settings = SetSettings(
            train_data_dir=str(folders.train(size)),
            heldout_data_dir=str(folders.heldout),
            caption_column="text",
            caption_encoding=None,
            output_dir=str(folders.work / "evaluation" / str(size)),
            embedder="pixel",
            embedder_weights=None,
            embedding_batch_size=32,
            clip_score_model=None,
            near_duplicates="drop",
            device="auto",
        )
        attacked = AttackSettings(
            pretrained_model_name_or_path=str(ROOT / COMMON["pretrained_model_name_or_path"]),
            pretrained_vae_model_name_or_path=None,
            revision=None,
            variant=None,
            prediction_type=None,
            lora_scale=1.0,
            num_images=IMAGES,
            images_per_prompt=None,
            batch_size=32,
            num_inference_steps=SAMPLING_STEPS,
            guidance_scale=GUIDANCE,
            resolution=None,
            num_seeds=1,
            seed=0,
            dtype="float32",
            device="auto",
            attacks=["noise"],
            attack_t=list(ATTACK_LEVELS),
            attack_modes=["one_step"],
            attack_steps=25,
            attack_prompts="caption",
            attack_images=64,
            mask_share=0.5,
        )
        embedding = Embedding(settings)
        train, heldout = embed_sets(settings, *read_sets(settings), embedding)
        assert heldout is not None  # heldout_data_dir is given
        sets = ReferenceSets(train, heldout, *(embedding.pooled(s.images) for s in (train, heldout)))
        planted = plant(settings, attacked, train, embedding.embedder)
        references = make_references(sets, ALPHA, CONFIDENCE, settings.embedder, planted)
        return Evaluation(settings, attacked, embedding, references)

    def measure(self, name: str, adapter: Path | None, t_n: int, seed: int, folder: Path) -> dict:
        """Every sampler's figures, the worst of them by excess, and the attacks', of one adapter or the base model."""
        # Each seed has other initial noise, so that the seeds' scatter holds that of sampling.
        attacked = replace(self.attack, seed=1000 * seed)
        checkpoint, references = Checkpoint(name, lora=adapter), self.references
        assert references.heldout  # see :meth:`of`
        drawn = generate(attacked, checkpoint, samplers(adapter, t_n), captions_of(self.sets.train_data_dir), folder)
        found = {}
        for sampler, (images, _) in drawn.items():
            one = read_folder(images)
            figures = folder_figures(self.embedding(one), self.embedding.pooled(one), references)
            found[sampler] = {key: figures[key] for key in KEPT}
        sets = references.train.images, references.heldout.images
        answers = attack(attacked, checkpoint, *sets, self.embedding.embedder, folder / "attack")
        return {
            "samplers": found,
            "worst": max(found, key=lambda s: found[s]["excess_over_heldout"]),
            "attacks": attack_figures(answers["train"], answers["heldout"]),
        }


def samplers(adapter: Path | None, t_n: int) -> list[Sampler]:
    """The ways a model is sampled; the base model has no adapter to scale or to take off."""
    if adapter is None:
        return [Sampler("full", guidance_scale=GUIDANCE), Sampler("guidance_1", guidance_scale=1.0)]
    return [
        Sampler("full", lora_scale=1.0, guidance_scale=GUIDANCE),
        Sampler("early_stop", "early_stop", t_n, lora_scale=1.0, guidance_scale=GUIDANCE),
        Sampler("hybrid", "hybrid", t_n, lora_scale=1.0, guidance_scale=GUIDANCE),
        Sampler("scale_1.5", lora_scale=1.5, guidance_scale=GUIDANCE),
    ]


def run(cell: Cell, folders: Folders) -> Path:
    """Train and measure one cell; what is there already is not done again. Returns its JSON."""
    path = folders.result(cell)
    if path.exists():
        return path
    adapters, cost = train(cell, folders)
    evaluation = Evaluation.of(folders, cell.size)
    lengths = {}
    for steps, adapter in adapters.items():
        folder = folders.work / "drawn" / cell.name / str(steps)
        lengths[str(steps)] = evaluation.measure(f"{cell.name}-{steps}", adapter, cell.sampler_t_n, cell.seed, folder)
    write_json(
        path,
        {
            "cell": {"method": cell.method, "t_n": cell.t_n, "size": cell.size, "seed": cell.seed},
            "flags": cell.flags,
            "threshold": threshold_figures(evaluation.references),
            "controls": {"fd_pixels_train_to_heldout": _control(evaluation)},
            "cost": cost,
            "lengths": lengths,
            "environment": environment_of_run(),
        },
    )
    return path


def _control(evaluation: Evaluation) -> float:
    train, heldout = evaluation.references.train_pooled, evaluation.references.heldout_pooled
    assert train is not None and heldout is not None
    return frechet_distance(train.features, heldout.features)
