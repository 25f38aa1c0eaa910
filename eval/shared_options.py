"""Options that several commands of the evaluation have, each declared once, and the checks that go with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eval.choices import EMBEDDERS, EMBEDDING_BATCH, PICTURES
from sdxl_ambient.config.parser import option, redeclare
from sdxl_ambient.config.shared import DTYPES, DeviceOptions, ImageOptions, ModelOptions, SeedOptions
from sdxl_ambient.errors import OptionError, StageError


@dataclass
class GenerationOptions(DeviceOptions, SeedOptions, ModelOptions):
    """Drawing"""

    lora_scale: float = option(1.0, "strength of the LoRA", minimum=0.0)
    prompts_file: str | None = option(None, "one prompt per line (.txt) or a 'text' per line (.jsonl)", metavar="FILE")
    num_images: int | None = option(None, "images per model and sampler; by default one per prompt", minimum=1)
    images_per_prompt: int | None = option(None, "images for each prompt, instead of --num_images", minimum=1)
    batch_size: int = option(8, "images drawn at once", minimum=1)
    num_inference_steps: int = option(25, "sampling steps", minimum=1)
    guidance_scale: float = option(5.0, "classifier-free guidance", minimum=0.0)
    resolution: int | None = option(None, "side of the images; by default the model's own", minimum=8)
    sampler_t_n: int | None = option(
        None, "noise level for early_stop and hybrid; by default the one the checkpoint was trained at", minimum=0
    )
    num_seeds: int = option(1, "draw all images once for each of so many seeds, from --seed on", minimum=1)
    dtype: str = option("float32", "precision of all networks; in float16 SDXL needs another VAE", choices=DTYPES)

    def check_generation(self) -> None:
        """Refuse what can't work, before anything is loaded. Raises OptionError."""
        from eval.checkpoints import check_model_path  # here for start-up time

        if self.num_images is not None and self.images_per_prompt is not None:
            raise OptionError("--images_per_prompt: can not be combined with --num_images; give one of them")
        if self.prompts_file is not None and not Path(self.prompts_file).is_file():
            raise OptionError(f"--prompts_file: {self.prompts_file!r} is not a file")
        if self.resolution is not None and self.resolution % 8:
            raise OptionError(f"--resolution: {self.resolution} is not a multiple of 8")
        check_model_path("pretrained_model_name_or_path", self.pretrained_model_name_or_path)
        self.check_single_file()
        self.validate_device()


@dataclass
class SetOptions:
    """Images"""

    train_data_dir: str = option(
        None, "the fine-tuning set; its captions are the prompts, unless --prompts_file is given", metavar="DIR"
    )
    heldout_data_dir: str | None = option(
        None,
        "images of the same source that were not trained on, the control; without them, eval.memorization takes the base "
        "model",
        metavar="DIR",
    )
    caption_column: str = redeclare(ImageOptions, "caption_column")
    caption_encoding: str | None = redeclare(ImageOptions, "caption_encoding")


@dataclass
class ResultOptions:
    """Result"""

    output_dir: str = option(None, "folder to write to", metavar="DIR")


@dataclass
class PageOptions:
    """Result"""

    pictures: str = option(
        "auto",
        "pictures in index.html: generated and training ones (all), generated ones alone, or hashes (none); auto: none with "
        "--max_excess, else all",
        choices=PICTURES,
    )


@dataclass
class EmbedderOptions:
    """Embedder"""

    embedder: str = option("pixel", "what similarity is measured in", choices=EMBEDDERS)
    embedder_weights: str | None = option(None, "local path or Hub id of the embedder's weights", metavar="PATH_OR_ID")

    def check_embedder(self) -> None:
        """Refuse an impossible choice, before anything is loaded. Raises OptionError."""
        from eval.embedders.registry import check_embedder  # here for start-up time

        try:
            check_embedder(self.embedder, self.embedder_weights)
        except StageError as error:
            raise OptionError(str(error)) from None


@dataclass
class BatchOptions(EmbedderOptions):
    """Embedder"""

    embedding_batch_size: int = option(EMBEDDING_BATCH, "images embedded at once", minimum=1)
