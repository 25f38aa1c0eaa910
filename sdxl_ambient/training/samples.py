"""Images drawn during training, at seeds that never change, so that steps can be compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from sdxl_ambient.models.load import assemble_pipeline, load_unet
from sdxl_ambient.models.lora import changes_base
from sdxl_ambient.models.vae import decode_latents, load_vae
from sdxl_ambient.pipeline import sample
from sdxl_ambient.provenance import atomic
from sdxl_ambient.randomness import sample_generator
from sdxl_ambient.training.distributed import is_sharded
from sdxl_ambient.training.model import TrainableModel
from sdxl_ambient.training.weights import BaseModel


@dataclass(frozen=True)
class SamplerSettings:
    """How images are drawn. Names are those of options.

    base: whose other parts the pipeline has. t_n: the level that a sampler hands over or stops at; None for clean latents.
    """

    base: BaseModel
    t_n: int | None
    low_noise: str
    seed: int
    validation_inference_steps: int


class ValidationSampler:
    """Draws with the weights that are trained, as they are now.

    VAE and text encoders are loaded for it and dropped again; the UNet is the one that is trained, and no second one is
    loaded but for ``hybrid`` after a full fine-tune, which needs the base model's. So memory rises by what a pipeline needs
    beside its UNet, in autocast's precision where there is one. Without sharding each process draws its share; with it, all
    draw all together, and one writes.
    """

    def __init__(self, settings: SamplerSettings, accelerator: Accelerator, trainable: TrainableModel):
        self.settings, self.accelerator, self.trainable = settings, accelerator, trainable
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}
        self.dtype = half.get(accelerator.mixed_precision, trainable.unet.dtype)  # of what is not trained

    @contextmanager
    def pipeline(self):
        """A stock pipeline around the module that is trained, in evaluation mode."""
        base, trainable = self.settings.base, self.trainable
        names = ("unet", "text_encoder", "text_encoder_2")
        parts: dict[str, torch.nn.Module] = dict(zip(names, trainable.modules, strict=False))
        if base.pretrained_vae_model_name_or_path is not None:
            parts["vae"] = load_vae(base.pretrained_model_name_or_path, base.pretrained_vae_model_name_or_path)
        pipe: Any = assemble_pipeline(
            base.pretrained_model_name_or_path, parts, dtype=self.dtype, revision=base.revision, variant=base.variant,
            prediction_type=base.prediction_type,
        )  # fmt: skip
        # SDXL's own VAE overflows in float16.
        pipe.vae.to(torch.float32 if self.dtype == torch.float16 else self.dtype)
        pipe.set_progress_bar_config(disable=True)
        pipe.vae.enable_slicing()  # decoded one by one
        pipe.vae.to(self.accelerator.device)
        pipe.text_encoder.to(self.accelerator.device)
        pipe.text_encoder_2.to(self.accelerator.device)
        before = [module.training for module in trainable.modules]
        for module in trainable.modules:
            module.eval()
        try:
            yield pipe
        finally:
            for module, training in zip(trainable.modules, before, strict=True):
                module.train(training)

    def sampler(self, name: str) -> str:
        """``auto`` → hybrid where the levels below t_n are the base model's, else full."""
        skips = self.settings.t_n is not None and self.settings.low_noise == "skip"
        return ("hybrid" if skips else "full") if name == "auto" else name

    @torch.no_grad()
    def draw(
        self, folder: Path, prompts: Sequence[str], count: int, sampler: str, purpose: str = "validation", at_once: int = 4
    ) -> list[list[Path]]:
        """``count`` images of each prompt, as ``folder/<prompt>-<image>.png``. All processes call it.

        Returns:
            for each prompt its files, which are all there when it returns.
        """
        files = [[folder / f"{i:02d}-{k:02d}.png" for k in range(count)] for i in range(len(prompts))]
        jobs = [(i, k) for i in range(len(prompts)) for k in range(count)]
        accelerator = self.accelerator
        together = is_sharded(accelerator)
        own = jobs if together else jobs[accelerator.process_index :: accelerator.num_processes]
        for (i, k), image in self._drawn(own, prompts, count, sampler, purpose, at_once):
            if accelerator.is_main_process or not together:
                with atomic(files[i][k]) as temporary:
                    image.save(temporary)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the pipeline is gone by now
        accelerator.wait_for_everyone()
        return files

    def _drawn(
        self, jobs: list[tuple[int, int]], prompts: Sequence[str], count: int, sampler: str, purpose: str, at_once: int
    ) -> Iterator[tuple[tuple[int, int], Image.Image]]:
        if not jobs:
            return
        with self.pipeline() as pipe:
            base_unet = self._base_unet(sampler)
            for start in range(0, len(jobs), at_once):
                some = jobs[start : start + at_once]
                with self.accelerator.autocast():
                    latents = sample(
                        pipe,
                        [prompts[i] for i, _ in some],
                        sampler=sampler,
                        t_n=self.settings.t_n,
                        base_unet=base_unet,
                        generators=[sample_generator(self.settings.seed, purpose, i * count + k) for i, k in some],
                        num_inference_steps=self.settings.validation_inference_steps,
                        output_type="latent",
                    )
                assert isinstance(latents, torch.Tensor)
                # Out of autocast, which would take a float32 VAE to float16.
                pixels = decode_latents(pipe.vae, latents)
                yield from zip(some, pipe.image_processor.postprocess(pixels, output_type="pil"), strict=True)

    def _base_unet(self, sampler: str):
        """The base model's UNet, where switching an adapter off is not enough to have it."""
        if sampler != "hybrid" or not (self.trainable.record["finetune"] == "full" or changes_base(self.trainable.unet)):
            return None
        base = self.settings.base
        name, revision, variant = base.pretrained_model_name_or_path, base.revision, base.variant
        unet = load_unet(name, dtype=self.dtype, revision=revision, variant=variant)
        return unet.to(self.accelerator.device).eval()


def track_images(accelerator, drawn: dict[str, list[Path]], step: int) -> None:
    """Show images (name → files) in the trackers that take images."""
    for tracker in accelerator.trackers:
        opened = {name: [Image.open(file) for file in files] for name, files in drawn.items()}
        if tracker.name == "tensorboard":
            for name, images in opened.items():
                tracker.writer.add_images(name, np.stack([np.asarray(i) for i in images]), step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb  # pyright: ignore[reportMissingImports] - optional: it is there where a tracker of that name is

            tracker.log({n: [wandb.Image(i, caption=n) for i in images] for n, images in opened.items()}, step=step)
        elif hasattr(tracker, "log_images"):
            tracker.log_images({n: [np.asarray(i) for i in images] for n, images in opened.items()}, step=step)
