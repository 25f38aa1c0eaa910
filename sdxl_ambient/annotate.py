r"""From which noise level on is an untrusted image as good as a trusted one? Writes that level for each, as its t_n.

    python -m sdxl_ambient.annotate --pretrained_model_name_or_path BASE --trusted_data_dir GOOD --untrusted_data_dir BAD \
        --output_dir OUT

The procedure of "Ambient Diffusion Omni" (arXiv 2506.10038): a small classifier learns to tell noisy latents of the two sets
apart, at every level; where it can't for an image, noise hides what is wrong with it.

    trusted/, untrusted/   links to the images; nothing is copied
    annotations.json       settings, how well the sets are told apart at every level, and every image's probabilities
    metadata.jsonl         file_name, text and t_n of both sets, written last; OUT is a --train_data_dir for --t_n_column t_n

This is about quality. It protects no image: trusted ones are stored clean unless --trusted_t_n is given. Clean latents and
the noise that the classifier sees exist in memory only. docs/ANNOTATING.md says how to read the result.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from scipy.special import expit
from scipy.stats import binomtest
from tqdm import tqdm

from sdxl_ambient.config import OptionError, option, parse_options
from sdxl_ambient.geometry import Geometry
from sdxl_ambient.images import ImageError, ImagesMissing, list_images, load_rgb
from sdxl_ambient.latents import check_resolution, encode_image
from sdxl_ambient.level_classifier import Training, calibrate, judge, stream, train_classifier
from sdxl_ambient.manifest import atomic, hash_json, hash_tensors, read_json, versions, write_json
from sdxl_ambient.models import ModelError, check_sdxl, load_schedule, load_vae
from sdxl_ambient.noise import CLEAN, NoiseSchedule
from sdxl_ambient.options import MAXIMUM_T_N, ModelOptions, check_writable
from sdxl_ambient.plan import Scanned, content_hash, scan
from sdxl_ambient.preview import PreviewError, check_device, is_store, one_process, resolve_device

SETS = ("trusted", "untrusted")
CONFIDENCE = 0.95
ANNOTATIONS, METADATA = "annotations.json", "metadata.jsonl"


class AnnotateError(ValueError):
    """Sets that can't be compared, or a folder that can't be written. The message is one line that says why."""


# -- options ----------------------------------------------------------------------


@dataclass
class AnnotateOptions(ModelOptions):
    """``python -m sdxl_ambient.annotate``."""

    trusted_data_dir: str | None = option(None, "folder of images as they should be, captions as in training")
    untrusted_data_dir: str | None = option(None, "folder of other images: blurred, recompressed, generated, …")
    caption_column: str = option("text", "the column of metadata.jsonl that holds the captions")
    instance_prompt: str | None = option(None, "caption for images that have none; without it they are skipped")
    resolution: int = option(1024, "side of the square that images are resized and cropped to, pixels", minimum=16)
    center_crop: bool = option(True, "crop the middle; if false, the place that a store would take")
    levels: list[int] = option(
        list(range(0, 951, 50)), "noise levels that are tested, timesteps", minimum=0, maximum=MAXIMUM_T_N
    )
    margin: float = option(
        0.05, "how far below 1/2, which is chance, an image's probability of being a trusted one may be", above=0
    )
    max_t_n: int = option(
        MAXIMUM_T_N, "untrusted images that are usable only above this level are left out", minimum=0, maximum=MAXIMUM_T_N
    )
    trusted_t_n: int | None = option(
        None, "noise level of the trusted images [default: clean]", minimum=0, maximum=MAXIMUM_T_N
    )
    train_steps: int = option(500, "optimizer steps of each classifier", minimum=1)
    batch_size: int = option(32, "noisy latents in a step, half of them of each set", minimum=2)
    learning_rate: float = option(2e-3, "of AdamW, falling to 0 by a cosine", above=0)
    num_noises: int = option(4, "noises that an image is judged with, at every level", minimum=1)
    folds: int = option(5, "classifiers; each judges the part of both sets that it was not trained on", minimum=2)
    seed: int = option(0, "weights, batches and noise follow from this", minimum=0)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, …")
    output_dir: str | None = option(None, "folder for the result")

    def validate(self) -> None:
        super().validate()
        for name in SETS:
            folder = getattr(self, f"{name}_data_dir")
            if not folder:
                raise OptionError(f"--{name}_data_dir: a value is required, a folder of images")
            if not Path(folder).is_dir():
                raise OptionError(f"--{name}_data_dir: {folder!r} is not a folder")
        if not self.output_dir:
            raise OptionError("--output_dir: a value is required, a folder for the result")
        check_writable("output_dir", self.output_dir)
        self._validate_places()
        if len(self.levels) < 2 or sorted(set(self.levels)) != self.levels:
            raise OptionError(f"--levels: {self.levels} is not allowed; two or more are needed, ascending, each once")
        if self.margin >= 0.5:
            raise OptionError(f"--margin: {self.margin:g} is not below 0.5, at which every image would be usable clean")
        if self.batch_size % 2:
            raise OptionError(f"--batch_size: {self.batch_size} is not even; half a batch is of each set")
        check_device(self.device)

    def _validate_places(self) -> None:
        """Three folders, none within another; and nothing of a user's where links will be."""
        places = {n: Path(getattr(self, n)).resolve() for n in ("trusted_data_dir", "untrusted_data_dir", "output_dir")}
        for name, place in places.items():
            for other, outer in places.items():
                if name != other and place.is_relative_to(outer):
                    raise OptionError(
                        f"--{name}: {getattr(self, name)!r} is or lies inside --{other}; allowed are three separate folders"
                    )
        output = places["output_dir"]
        store = next((folder for folder in (output, *output.parents) if is_store(folder)), None)
        if store is not None:
            raise OptionError(
                f"--output_dir: {self.output_dir!r} lies inside the store of noisy latents {str(store)!r}; allowed is a "
                "folder elsewhere"
            )
        if output.is_dir() and any(output.iterdir()) and not is_result(output):
            raise OptionError(
                f"--output_dir: {self.output_dir!r} holds something else; allowed is a new or empty folder, or a result of "
                "this program, which is replaced"
            )


def is_result(folder: Path) -> bool:
    """Whether a folder holds what this program writes, finished or not, and where its links are nothing but links."""
    try:
        ours = read_json(folder / ANNOTATIONS)["program"] == "sdxl_ambient.annotate"
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return ours and all(p.is_symlink() or p.is_dir() for name in SETS for p in (folder / name).rglob("*"))


# -- the rule ----------------------------------------------------------------------


def usable_from(levels: Sequence[int], probabilities: Sequence[float], margin: float, chance: float = 0.5) -> int | None:
    """t_n = min {ℓ : p(ℓ′) ≥ chance − margin for every tested ℓ′ ≥ ℓ}; None where the highest level fails.

    ``levels`` ascend; ``probabilities`` are of being a trusted image, the mean over noises at each level. One-sided: an
    image that looks more trusted than chance is usable. arXiv 2506.10038 takes the first ℓ with p > ½ − ε, its threshold
    being .45; here all levels above must agree, as all of them will be trained on.
    """
    usable = None
    for level, probability in zip(reversed(levels), reversed(probabilities), strict=True):
        if not probability >= chance - margin:
            break
        usable = level
    return usable


# -- two sets ----------------------------------------------------------------------


@dataclass
class ImageSet:
    """The usable files of a set, its distinct pictures in the order of their hashes, and those files that are skipped."""

    name: str
    folder: Path
    pictures: list[Scanned]
    skipped: list[dict]
    contents: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.contents = sorted({p.content for p in self.pictures})

    def distinct(self) -> list[Scanned]:
        """One file of each picture, in the order of ``contents``."""
        first = {p.content: p for p in reversed(self.pictures)}
        return [first[c] for c in self.contents]


def read_set(options: AnnotateOptions, name: str, state, say) -> ImageSet:
    """Open every image of a set once. Raises ImagesMissing for one without a usable image."""
    folder = Path(getattr(options, f"{name}_data_dir"))
    records = list_images(folder, options.caption_column, captions_needed=not options.instance_prompt)
    pictures, skipped = scan(records, options.instance_prompt, state)
    if not pictures:
        raise ImagesMissing(f"none of {len(records)} images in {str(folder)!r} can be used: {skipped[0]['reason']}")
    if skipped:
        first = f"{skipped[0]['file']}: {skipped[0]['reason']}"
        say(f"note: {len(skipped)} of {len(records)} {name} images are skipped, the first is {first}")
    return ImageSet(name, folder, pictures, skipped)


def check_sets(trusted: ImageSet, untrusted: ImageSet, folds: int) -> None:
    """Enough images for the folds, and none in both sets; an AnnotateError else."""
    for one in (trusted, untrusted):
        if len(one.contents) < folds:
            raise AnnotateError(
                f"--folds: {folds} is more than the {len(one.contents)} distinct usable images in --{one.name}_data_dir; "
                "each fold needs one of them"
            )
    shared = sorted(set(trusted.contents) & set(untrusted.contents))
    if shared:
        files = [next(p.record.name for p in one.pictures if p.content == shared[0]) for one in (trusted, untrusted)]
        raise AnnotateError(
            f"{len(shared)} images are in both sets, the first is {files[0]} of --trusted_data_dir and {files[1]} of "
            "--untrusted_data_dir; an image is one or the other"
        )


def encode(one: ImageSet, vae, geometry: Geometry) -> torch.Tensor:
    """Clean latents (n, 4, h, w) of a set's distinct pictures, float32 in the CPU's memory; they are written nowhere."""
    latents = []
    for picture in tqdm(one.distinct(), desc=f"encoding {one.name} images", unit="img", mininterval=1):
        image = load_rgb(picture.record.path)
        if content_hash(image) != picture.content:
            raise AnnotateError(f"{picture.record.path} changed while it was being encoded")
        latents.append(encode_image(vae, geometry.apply(image, picture.content)[0]))
    return torch.stack(latents)


# -- cross-fitting ----------------------------------------------------------------------


def fold_of(count: int, folds: int) -> np.ndarray:
    """The fold of each of a set's pictures, (count,): in turn, in the order of their hashes; all are equally full."""
    return np.arange(count) % folds


def cross_fit(
    options: AnnotateOptions, schedule: NoiseSchedule, x_0: dict[str, torch.Tensor], contents: dict[str, list[str]]
) -> dict[str, np.ndarray]:
    """Logits of "trusted" (n, levels, noises) of both sets, every image's by a classifier that was not trained on it."""
    networks, folds = [], {name: fold_of(len(x), options.folds) for name, x in x_0.items()}
    how = Training(options.levels[0], options.levels[-1], options.train_steps, options.batch_size, options.learning_rate)
    total = options.folds * options.train_steps
    with tqdm(total=total, desc="training classifiers", unit="step", mininterval=1) as bar:
        for fold in range(options.folds):
            others = (x_0[name][torch.from_numpy(folds[name] != fold)] for name in SETS)
            generator, device = stream(options.seed, "training", fold), resolve_device(options.device)
            networks.append(train_classifier(*others, schedule, how, generator, device, lambda loss: bar.update()))
    logits = {name: np.empty((len(x), len(options.levels), options.num_noises)) for name, x in x_0.items()}
    for name in SETS:
        for i, content in enumerate(tqdm(contents[name], desc=f"judging {name} images", unit="img", mininterval=1)):
            noises = [stream(options.seed, "judging", content, t) for t in options.levels]
            network = networks[folds[name][i]]
            logits[name][i] = judge(network, x_0[name][i], options.levels, noises, options.num_noises)
    return logits


def calibrated(logits: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[tuple[float, float]]]:
    """Mean probabilities of "trusted" per image and level (n, levels) of both sets, and each level's slope and shift."""
    scales = [calibrate(logits["trusted"][:, k], logits["untrusted"][:, k]) for k in range(logits["trusted"].shape[1])]
    a, b = (np.array(values)[None, :, None] for values in zip(*scales, strict=True))
    return {name: expit(a * x + b).mean(2) for name, x in logits.items()}, scales


def accuracy(logits: dict[str, np.ndarray], k: int) -> dict:
    """How many held-out images the classifiers put into the right set at level ``k``, as they are, uncalibrated.

    Each set has its Clopper–Pearson interval (95 %). ``accuracy`` is the mean of both sets' shares, whatever their sizes,
    and its interval the mean of their 97.5 % intervals, which holds at 95 % by the union bound.
    """
    found, both = {}, []
    for name in SETS:
        p = expit(logits[name][:, k]).mean(1)
        right, total = int(((p > 0.5) == (name == "trusted")).sum()), len(p)
        test = binomtest(right, total)
        interval = list(test.proportion_ci(CONFIDENCE, method="exact"))
        found[name] = {"right": right, "of": total, "interval": interval}
        both.append((right / total, *test.proportion_ci((1 + CONFIDENCE) / 2, method="exact")))
    mean, low, high = np.mean(both, axis=0).tolist()
    return {"accuracy": mean, "interval": [low, high], **found}


def warnings_of(levels: Sequence[int], accuracies: Sequence[dict]) -> list[str]:
    """What speaks against using the result."""
    found = []
    lowest, highest = ({"t": t, **a} for t, a in ((levels[0], accuracies[0]), (levels[-1], accuracies[-1])))
    if lowest["interval"][0] <= 0.5:
        found.append(
            f"the sets can't be told apart even at t = {lowest['t']} (accuracy {_spoken(lowest)}): either untrusted images "
            "are as good as trusted ones, or these are too few to see the difference, or --train_steps are"
        )
    if highest["interval"][0] > 0.5:
        found.append(
            f"the sets can still be told apart at the highest level, t = {highest['t']} (accuracy {_spoken(highest)}): they "
            "differ in more than noise hides, such as colour or subject"
        )
    return found


def _spoken(accuracy: dict) -> str:
    low, high = accuracy["interval"]
    return f"{accuracy['accuracy']:.0%}, interval {low:.0%} to {high:.0%}"


# -- the result ----------------------------------------------------------------------


def describe(
    options: AnnotateOptions, sets: Sequence[ImageSet], logits: dict[str, np.ndarray], inputs: dict[str, str]
) -> dict:
    """annotations.json."""
    probabilities, scales = calibrated(logits)
    accuracies = [accuracy(logits, k) for k in range(len(options.levels))]
    levels = {}
    for k, t in enumerate(options.levels):
        means = {name: float(probabilities[name][:, k].mean()) for name in SETS}
        slope, shift = scales[k]
        levels[str(t)] = {**accuracies[k], "mean_probability": means, "calibration": {"slope": slope, "shift": shift}}
    images = [
        {
            "set": one.name,
            **_judged(options, one.name, picture, probabilities[one.name][one.contents.index(picture.content)]),
        }
        for one in sets
        for picture in one.pictures
    ]
    left_out = [i for i in images if not i["used"]]
    return {
        "program": "sdxl_ambient.annotate",
        "note": "t_n is about quality, not about privacy: the links lead to clean images, and t_n -1 stores them clean.",
        "settings": asdict(options),
        "inputs": inputs,
        "versions": versions(),
        "counts": {
            **{one.name: len(one.pictures) for one in sets},
            "used": len(images) - len(left_out),
            "not_usable": len(left_out),
            "skipped": sum(len(one.skipped) for one in sets),
        },
        "warnings": warnings_of(options.levels, accuracies),
        "levels": levels,
        "images": images,
        "skipped": [{"set": one.name, **entry} for one in sets for entry in one.skipped],
    }


def _judged(options: AnnotateOptions, name: str, picture: Scanned, probabilities: np.ndarray) -> dict:
    """An image's entry: its level, and whether it is used."""
    values = [round(float(p), 6) for p in probabilities]
    if name == "trusted":
        t_n, used = CLEAN if options.trusted_t_n is None else options.trusted_t_n, True
    else:
        t_n = usable_from(options.levels, values, options.margin)
        used = t_n is not None and t_n <= options.max_t_n
    captions = list(picture.record.captions)
    return {
        "file": f"{name}/{picture.record.name}",
        "content": picture.content,
        "t_n": t_n,
        "used": used,
        "text": captions[0] if len(captions) == 1 else captions,
        "probabilities": values,
    }


def write_result(output: Path, found: dict, sets: Sequence[ImageSet]) -> None:
    """Links, annotations.json, and metadata.jsonl last: without it the trainer refuses the folder."""
    (output / METADATA).unlink(missing_ok=True)
    # Before the links, so that a broken-off result is known for one.
    write_json(output / ANNOTATIONS, found)
    for name in SETS:
        for path in (output / name).rglob("*"):
            if path.is_symlink():
                path.unlink()
    sources = {f"{one.name}/{p.record.name}": p.record.path for one in sets for p in one.pictures}
    used = [image for image in found["images"] if image["used"]]
    for image in used:
        link = output / image["file"]
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.abspath(sources[image["file"]]))
    rows = [{"file_name": i["file"], "text": i["text"], "t_n": i["t_n"]} for i in used]
    with atomic(output / METADATA) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def annotate(options: AnnotateOptions, say=print) -> dict:
    """Judge every untrusted image and write the result. Returns annotations.json.

    Raises:
        ImagesMissing, ImageError, ModelError, AnnotateError, PreviewError: with one line that says what is wrong.
    """
    base, device = options.pretrained_model_name_or_path, resolve_device(options.device)
    check_sdxl(base, options.revision)
    schedule = load_schedule(base, options.revision)
    if options.levels[-1] >= schedule.num_timesteps - 1:
        raise ModelError(
            f"--levels: {options.levels[-1]} leaves nothing above it to train on; this model's last is "
            f"{schedule.num_timesteps - 1}"
        )
    vae = load_vae(base, options.pretrained_vae_model_name_or_path, revision=options.revision, variant=options.variant)
    check_resolution(options.resolution, vae)
    state = one_process(device)
    sets = [read_set(options, name, state, say) for name in SETS]
    check_sets(*sets, options.folds)
    geometry = Geometry(options.resolution, options.center_crop)
    inputs = {"vae": hash_tensors(vae.state_dict())[:16], "schedule": schedule.hash[:16]}
    inputs.update({f"{one.name}_images": hash_json(one.contents)[:16] for one in sets})
    vae.to(device)
    x_0 = {one.name: encode(one, vae, geometry) for one in sets}
    del vae
    logits = cross_fit(options, schedule, x_0, {one.name: one.contents for one in sets})
    found = describe(options, sets, logits, inputs)
    write_result(Path(options.output_dir), found, sets)
    return found


# -- command line ----------------------------------------------------------------------


def training_command(options: AnnotateOptions) -> str:
    """What trains on the result."""
    told = {
        "pretrained_model_name_or_path": options.pretrained_model_name_or_path,
        "pretrained_vae_model_name_or_path": options.pretrained_vae_model_name_or_path,
        "revision": options.revision,
        "variant": options.variant,
        "train_data_dir": options.output_dir,
        "t_n_column": "t_n",
        "resolution": options.resolution,
        "center_crop": None if options.center_crop else "false",
        "output_dir": f"{options.output_dir.rstrip('/')}-trained",
    }
    words = [word for name, value in told.items() if value is not None for word in (f"--{name}", str(value))]
    return shlex.join(["accelerate", "launch", "train_sdxl_ambient.py", *words])


def in_words(options: AnnotateOptions, found: dict) -> list[str]:
    """What is printed at the end."""
    lines = ["    t  accuracy  interval     mean probability: trusted, untrusted"]
    for t, level in found["levels"].items():
        low, high = level["interval"]
        means = level["mean_probability"]
        lines.append(
            f"{t:>5} {level['accuracy']:>8.2f}  {low:.2f} to {high:.2f}  {means['trusted']:>22.2f}, {means['untrusted']:.2f}"
        )
    lines += [f"warning: {warning}" for warning in found["warnings"]]
    counts = found["counts"]
    used = [i["t_n"] for i in found["images"] if i["used"] and i["set"] == "untrusted"]
    spread = ""
    if used:
        low, middle, high = np.quantile(used, (0, 0.5, 1), method="inverted_cdf")
        spread = f" at t_n from {low} to {high}, median {middle}"
    trusted = "clean" if options.trusted_t_n is None else f"at t_n = {options.trusted_t_n}"
    lines += [
        f"{counts['trusted']} trusted images, {trusted}",
        f"{counts['untrusted']} untrusted images: {len(used)} usable{spread}; {counts['not_usable']} left out, usable at no "
        f"level up to {min(options.max_t_n, options.levels[-1])}",
        f"{counts['skipped']} files skipped",
        f"{options.output_dir} leads to clean images: treat it like them. To train on it:",
        training_command(options),
    ]
    return lines


def main(argv: list[str] | None = None) -> int:
    options = parse_options(AnnotateOptions, argv, prog="sdxl_ambient.annotate", description=__doc__)
    try:
        found = annotate(options)
    except (ImagesMissing, ImageError, ModelError, AnnotateError, PreviewError, OSError) as error:
        print(f"sdxl_ambient.annotate: error: {error}", file=sys.stderr)
        return 2
    print(*in_words(options, found), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
