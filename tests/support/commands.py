"""The commands of the two packages, and the options that each has."""

from eval.attack import AttackCommandOptions
from eval.embed import EmbedOptions
from eval.generate import GenerateOptions
from eval.options import MemorizationOptions
from sdxl_ambient.annotate.options import AnnotateOptions
from sdxl_ambient.config import LatentsOptions, TrainOptions
from sdxl_ambient.export import ExportOptions
from sdxl_ambient.hub.options import PushOptions
from sdxl_ambient.loop.options import LoopOptions
from sdxl_ambient.preview.options import PreviewOptions
from sdxl_ambient.privacy.options import PrivacyOptions

OPTIONS = {
    "train_sdxl_ambient": TrainOptions,
    "sdxl_ambient.latents": LatentsOptions,
    "sdxl_ambient.preview": PreviewOptions,
    "sdxl_ambient.privacy": PrivacyOptions,
    "sdxl_ambient.annotate": AnnotateOptions,
    "sdxl_ambient.loop": LoopOptions,
    "sdxl_ambient.export": ExportOptions,
    "sdxl_ambient.hub": PushOptions,
    "eval.memorization": MemorizationOptions,
    "eval.generate": GenerateOptions,
    "eval.embed": EmbedOptions,
    "eval.attack": AttackCommandOptions,
}
WITHOUT_OPTIONS = ("eval.report", "sdxl_ambient.option_table", "sdxl_ambient.option_template")
