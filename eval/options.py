"""The options of ``python -m eval.memorization``, checked before anything is loaded."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eval.attacks.options import AttackOptions
from eval.choices import ALPHA, BASE, CONFIDENCE, SAMPLERS, STAGES, WORST_CASES
from eval.shared_options import BatchOptions, PageOptions, ResultOptions, SetOptions
from sdxl_ambient.config.parser import option
from sdxl_ambient.errors import OptionError

if TYPE_CHECKING:
    from eval.checkpoints import Checkpoint

PRESETS = {"default": "dinov2", "paper": "dinov2_paper"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass
class EvaluatedOptions:
    """Models and samplers"""

    lora: list[str] = option([], "LoRAs to evaluate, diffusers' or kohya's format, each [NAME=]PATH", metavar="[NAME=]PATH")
    unet: list[str] = option(
        [], "fully fine-tuned UNets to evaluate, folders or single files, each [NAME=]PATH", metavar="[NAME=]PATH"
    )
    checkpoints: list[str] = option(
        [], "training runs, of which every checkpoint-* is evaluated, each [NAME=]DIR", metavar="[NAME=]DIR"
    )
    generated_dir: list[str] = option([], "folders of images made elsewhere, each [NAME=]DIR", metavar="[NAME=]DIR")
    samplers: list[str] = option(["full"], "how you sample each LoRA and UNet; the first is yours", choices=SAMPLERS)
    worst_case: str = option("standard", "further samplers that the verdict is the worst of", choices=WORST_CASES)
    worst_case_images: int | None = option(
        None, "--num_images for those further samplers; by default as many as for yours", minimum=1
    )
    skip_attacks: bool = option(False, "leave out the attacks on the weights")
    skip_base: bool = option(False, "leave out the base model, which is a control")


@dataclass
class MemorizationOptions(
    PageOptions, ResultOptions, BatchOptions, SetOptions, EvaluatedOptions, AttackOptions
):  # the help shows the last one first
    """Measuring"""

    preset: str | None = option(
        None, "embedder and preprocessing: DINOv2 ViT-L, or what the paper measured with", choices=tuple(PRESETS)
    )
    clip_score_model: str | None = option(None, "CLIP model for the CLIP score: local path or Hub id", metavar="PATH_OR_ID")
    alpha: float = option(ALPHA, "share of unrelated images that may exceed the threshold", above=0.0, maximum=0.5)
    confidence: float = option(CONFIDENCE, "of the intervals", minimum=0.5, maximum=0.9999)
    max_excess: float | None = option(
        None, "budget: exit with 1 where a model's copied share, whole interval, lies above this", minimum=0, maximum=1
    )
    near_duplicates: str = option(
        "drop", "held-out and training images that show the same picture as a training image", choices=("drop", "keep")
    )
    local_copies: str = option(
        "auto", "copies of a part, by keypoints; auto: where opencv and faiss are installed", choices=("auto", "off")
    )
    until: str = option("measure", "the last stage to run", choices=STAGES)

    def validate(self) -> None:
        from eval.checkpoints import check_checkpoint  # here for start-up time

        for name in ("train_data_dir", "output_dir"):
            if getattr(self, name) is None:
                raise OptionError(f"--{name}: required")
        tuned = self.lora or self.unet or self.checkpoints
        if self.pretrained_model_name_or_path is None and (tuned or not self.generated_dir):
            raise OptionError("--pretrained_model_name_or_path: required, unless images are given with --generated_dir")
        self.check_generation()
        for name in ("train_data_dir", "heldout_data_dir"):
            if getattr(self, name) is not None and not Path(getattr(self, name)).is_dir():
                raise OptionError(f"--{name}: {getattr(self, name)!r} is not a folder")
        for checkpoint in self.models():
            for name in ("lora", "unet"):
                if getattr(checkpoint, name):
                    check_checkpoint(name, getattr(checkpoint, name))
        for folder in self.given().values():
            if not folder.is_dir():
                raise OptionError(f"--generated_dir: {str(folder)!r} is not a folder")
        if not self.models() and not self.given():
            given = "--lora, --unet, --checkpoints or --generated_dir"
            raise OptionError(f"--skip_base: leaves nothing to evaluate; give {given}")
        from eval.sets import check_set_folders  # here for start-up time

        check_set_folders(self.train_data_dir, self.heldout_data_dir, self.output_dir)
        self._check_models_of_images()

    def models(self) -> list[Checkpoint]:
        """The models to draw from, the base first. Raises OptionError for names that clash or can't be folder names."""
        from eval.checkpoints import Checkpoint  # here for start-up time

        if self.pretrained_model_name_or_path is None:
            return []
        models = self._tuned()
        _check_unique([BASE, *(c.name for c in models), *self.given()])
        return models if self.skip_base else [Checkpoint(BASE), *models]

    def _tuned(self) -> list[Checkpoint]:
        """The fine-tuned models, looked for once: what is left out of a run is warned of."""
        from eval.checkpoints import Checkpoint, run_checkpoints  # here for start-up time

        paths = (*self.lora, *self.unet, *self.checkpoints)
        if getattr(self, "_looked_for", None) == paths:
            return self._found
        models = []
        for kind in ("lora", "unet"):
            for value in getattr(self, kind):
                name, path = _named(kind, value)
                models.append(Checkpoint(name, lora=path) if kind == "lora" else Checkpoint(name, unet=path))
        for value in self.checkpoints:
            name, path = _named("checkpoints", value)
            if not path.is_dir():
                raise OptionError(f"--checkpoints: {str(path)!r} is not a folder")
            models += run_checkpoints(name, path, warn=_warn, option_name="checkpoints")
        self._looked_for, self._found = paths, models
        return models

    def given(self) -> dict[str, Path]:
        """The folders of images that are there already, by name."""
        pairs = [_named("generated_dir", value) for value in self.generated_dir]
        _check_unique([name for name, _ in pairs])
        return dict(pairs)

    def _check_models_of_images(self) -> None:
        if self.preset is not None:
            if self.embedder != "pixel":
                raise OptionError(f"--preset: {self.preset!r} names an embedder, and so does --embedder; give one of them")
            self.embedder = PRESETS[self.preset]
        clip = self.clip_score_model
        if clip is not None and clip.startswith(("/", ".", "~")) and not Path(clip).is_dir():
            raise OptionError(f"--clip_score_model: {clip!r} is not a folder; give one, or a model id of the Hub")
        self.check_embedder()


def _warn(message: str) -> None:
    from eval.processes import is_main  # here for start-up time

    if is_main():
        print(f"eval.memorization: {message}", file=sys.stderr)


def _named(kind: str, value: str) -> tuple[str, Path]:
    """ "NAME=PATH", or a path that gives its own name."""
    name, equals, path = value.partition("=")
    if not equals:
        name, path = Path(value).resolve().name.removesuffix(".safetensors"), value
    if not _NAME.fullmatch(name) or not path:
        raise OptionError(f"--{kind}: {value!r} must be NAME=PATH, the name of letters, digits, '.', '_' and '-'")
    return name, Path(path)


def _check_unique(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise OptionError(f"two models are called {name!r}; name them apart with NAME=PATH")
