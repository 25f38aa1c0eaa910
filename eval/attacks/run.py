"""Runs the attacks on a model's training and held-out images, resumably, in one process or several."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eval import processes
from eval.attacks.batch import Batch, readable
from eval.attacks.kinds import KINDS
from eval.attacks.membership import SETS, Scores, attack_figures
from eval.attacks.model import LoadedModel
from eval.attacks.settings import AttackSettings
from eval.checkpoints import Checkpoint, hash_weights
from eval.drawing import base_folder, open_pipeline
from eval.embedders.registry import Embedder
from eval.images import ImageSet
from eval.stored import arrays, read_object
from sdxl_ambient.devices import resolve_device
from sdxl_ambient.errors import StageError
from sdxl_ambient.provenance import differences, hash_json, write_sealed


@torch.no_grad()
def run_attacks(model: LoadedModel, embedder: Embedder, images: ImageSet, settings: AttackSettings) -> tuple[int, Scores]:
    """The scores that ``settings.attacks`` give one batch of images: how many could be opened, and arrays (n,) by name."""
    images, pictures = readable(images)
    scores: Scores = {}
    if pictures:
        batch = Batch(model, embedder, images, pictures)
        for name in dict.fromkeys(settings.attacks):
            scores.update(KINDS[name](batch, settings))
    return len(pictures), scores


def run_attacks_on_sets(
    model: LoadedModel,
    embedder: Embedder,
    sets: dict[str, ImageSet],
    settings: AttackSettings,
    name: str = "",
    parts: Path | None = None,
) -> dict[str, Scores]:
    """Each set's scores, from all processes: float64 arrays in the order of the images, the same in every process.

    Batches are made before any image is opened, so that neither the processes nor an unreadable image change who shares a
    batch. Attacks that gave one of the sets no score are left out of all. Each batch's scores are kept in the folder
    ``parts``, where an interrupted run finds them again; it belongs to one set of settings.

    Raises:
        StageError: no image of a set can be opened, no attack can be run on all sets, or a score isn't finite.
    """
    batches = [(key, i, one) for key, s in sets.items() for i, one in enumerate(_batches(s, settings.batch_size))]
    own_batches = processes.share(batches)
    done: list[tuple[str, int, Scores]] = []
    total = sum(len(images) for *_, images in own_batches)
    with tqdm(total=total, unit="image", desc=f"attack {name}", delay=2, disable=not processes.is_main()) as bar:
        for key, i, images in own_batches:
            path = parts / f"{key}-{settings.batch_size}-{i}.json" if parts else None
            done.append((key, *_stored(path, len(images), lambda one=images: run_attacks(model, embedder, one, settings))))
            bar.update(len(images))
    done = processes.collect(done)
    for key, images in sets.items():
        if not (kept := sum(count for one, count, _ in done if one == key)):
            raise _none_left(images, len(images) - kept)
    return _combine(done, sets)


def _stored(path: Path | None, most: int, compute: Callable[[], tuple[int, Scores]]) -> tuple[int, Scores]:
    """The count and the scores that ``path`` holds, or that are computed now and kept there. A damaged file is replaced.

    ``most``: how many images there are, of which some may be unreadable.
    """
    if path is not None and path.exists():
        try:
            return _read_part(path, most)
        except StageError as error:
            tqdm.write(f"passed over: {error}")
    count, scores = compute()
    # Others are no JSON, and are refused where all are there.
    if path is not None and all(np.isfinite(values).all() for values in scores.values()):
        write_sealed(path, {"count": count, "answers": {name: values.tolist() for name, values in scores.items()}})
    return count, scores


def _read_part(path: Path, most: int) -> tuple[int, Scores]:
    advice = "it is computed anew"
    stored = read_object(path, ["answers"], advice)
    count = stored.get("count")
    if type(count) is not int or not 0 <= count <= most or (stored["answers"] and not count):
        raise StageError(f"{path} is damaged: its count is not that of its images; {advice}")
    answers = arrays(stored["answers"], path, advice, [count]) if stored["answers"] else {}
    return count, {name: values.astype(np.float32) for name, values in answers.items()}


def _earlier_scores(path: Path, settings: dict, sets: dict[str, ImageSet]) -> dict[str, Scores] | StageError | None:
    """What :func:`_read_scores` returns or raises, for all processes; None where there is no such file."""
    try:
        return _read_scores(path, settings, sets) if path.exists() else None
    except StageError as error:
        return error


def _read_scores(path: Path, settings: dict, sets: dict[str, ImageSet]) -> dict[str, Scores]:
    """The scores of all sets that an earlier run left. Raises StageError for a damaged file, or one of other settings."""
    advice = "delete that file and run again"
    stored = read_object(path, ["settings", "answers"], advice)
    if changed := differences(stored["settings"], settings):
        raise StageError(f"{path} was made with other settings: {'; '.join(changed)}; give another --output_dir")
    answers = stored["answers"]
    if wrong := [key for key in sets if not isinstance(answers.get(key), dict)]:
        raise StageError(f"{path} is damaged: it has no scores of {wrong[0]}; {advice}")
    scores = {key: arrays(answers[key], path, advice, range(1, len(images) + 1)) for key, images in sets.items()}
    if len({frozenset(one) for one in scores.values()}) > 1:
        raise StageError(f"{path} is damaged: its sets have scores of different attacks; {advice}")
    return scores


def _batches(images: ImageSet, size: int) -> list[ImageSet]:
    return [images.subset(range(i, min(i + size, len(images)))) for i in range(0, len(images), size)]


def _none_left(images: ImageSet, unreadable: int = 0) -> StageError:
    left_out = len(images.excluded) + unreadable
    return StageError(f"{images.folder}: no image left to attack with ({left_out} left out)")


def _combine(done: list[tuple[str, int, Scores]], sets: dict[str, ImageSet]) -> dict[str, Scores]:
    parts: dict[str, dict[str, list[np.ndarray]]] = {key: {} for key in sets}
    for key, _, scores in done:
        for name, values in scores.items():
            parts[key].setdefault(name, []).append(values)
    names = [n for n in parts[next(iter(sets))] if all(n in scores for scores in parts.values())]
    if not names:
        raise StageError("--attacks: magnitude needs captions, and one of the sets has none")
    joined = {key: {n: np.concatenate(scores[n]).astype(np.float64) for n in names} for key, scores in parts.items()}
    for key, scores in joined.items():
        if broken := [name for name, values in scores.items() if not np.isfinite(values).all()]:
            raise StageError(f"{sets[key].folder}: {broken[0]} isn't finite; in float16 SDXL needs another VAE")
    return joined


def attack(
    settings: AttackSettings, checkpoint: Checkpoint, train: ImageSet, heldout: ImageSet, embedder: Embedder, folder: Path
) -> dict[str, Scores]:
    """Every attack's scores on one model, computed or read from where they are: ``{"train": {name: (n,)}, "heldout": …}``.

    Names are ``error/T``, ``MODE/T``, ``mask`` and ``magnitude``; figures are made of them by :func:`attack_figures`. All
    processes call it, share the batches and get the same; the main one writes ``folder``/attack.json.

    Raises:
        StageError: ``folder`` has scores of other settings, a set has no usable image, or a score isn't finite.
    """
    sets = {key: images.thinned(settings.attack_images) for key, images in zip(SETS, (train, heldout), strict=True)}
    recorded = attack_settings(settings, checkpoint, sets["train"], sets["heldout"], embedder)
    path = Path(folder) / "attack.json"
    # The main process looks, for all: another could look when the file is already written, and miss the work to share.
    stored = processes.collect([_earlier_scores(path, recorded, sets) if processes.is_main() else None])[0]
    if isinstance(stored, StageError):
        raise stored
    parts = Path(folder) / f"parts-{hash_json(recorded)[:16]}"
    if stored is not None:
        if processes.is_main():  # a run that was cut off between the two
            shutil.rmtree(parts, ignore_errors=True)
        return stored
    for images in sets.values():
        if not len(images):
            raise _none_left(images)
    scores = run_attacks_on_sets(_open(settings, checkpoint), embedder, sets, settings, checkpoint.name, parts)
    if processes.is_main():
        lists = {key: {name: values.tolist() for name, values in one.items()} for key, one in scores.items()}
        figures = attack_figures(scores["train"], scores["heldout"])
        write_sealed(path, {"settings": recorded, "answers": lists, "figures": figures})
        shutil.rmtree(parts, ignore_errors=True)
    processes.wait()
    return scores


def _open(settings: AttackSettings, checkpoint: Checkpoint) -> LoadedModel:
    pipe = open_pipeline(settings, checkpoint, settings.lora_scale)
    return LoadedModel(pipe, settings.resolution or pipe.default_sample_size * pipe.vae_scale_factor)


def attack_settings(
    settings: AttackSettings, checkpoint: Checkpoint, train: ImageSet, heldout: ImageSet, embedder: Embedder
) -> dict:
    """Everything that determines the scores, as attack.json keeps it; not how the work is cut into batches."""
    sets = {"train": train, "heldout": heldout}
    needs_captions = settings.attack_prompts == "caption" or "magnitude" in settings.attacks
    vae = settings.pretrained_vae_model_name_or_path
    return {
        **{name: getattr(settings, name) for name in _deciding(settings)},
        "attacks": sorted(set(settings.attacks)),
        "lora_scale": settings.lora_scale if checkpoint.lora else None,
        "device": torch.device(resolve_device(settings.device)).type,
        "base_weights": hash_weights(base_folder(settings), "base"),
        **({} if settings.prediction_type is None else {"prediction_type": settings.prediction_type}),
        "vae_weights": hash_weights(Path(vae), "vae") if vae and Path(vae).exists() else vae,
        "lora_weights": hash_weights(checkpoint.lora, "lora") if checkpoint.lora else None,
        "unet_weights": hash_weights(checkpoint.unet, "unet") if checkpoint.unet else None,
        "embedder": embedder.key,
        **{key: images.hashes for key, images in sets.items()},
        "captions": {key: hash_json([r.caption for r in images.records]) for key, images in sets.items()}
        if needs_captions
        else None,
    }


def _deciding(settings: AttackSettings) -> list[str]:
    """The settings that change a score of the attacks that are run."""
    names = ["attack_steps", "attack_prompts", "resolution", "seed", "dtype"]
    if "noise" in settings.attacks:
        names += ["attack_t", "attack_modes"]
    if "mask" in settings.attacks:
        names += ["mask_share"]
    if {"mask", "magnitude"} & set(settings.attacks):
        names += ["guidance_scale"]
    return names
