"""The parts of a training run: built, resumed, stepped, validated, saved."""

from sdxl_ambient.training.checkpoint import check_checkpoint, checkpoints, find_checkpoint, save_checkpoint
from sdxl_ambient.training.clean_levels import CleanLevels
from sdxl_ambient.training.ema import EMA
from sdxl_ambient.training.extra_rows import ExtraBatch, ExtraSource
from sdxl_ambient.training.interruption import Interrupted, Interruption
from sdxl_ambient.training.model import TrainableModel, load_trainable
from sdxl_ambient.training.optimizers import make_optimizer
from sdxl_ambient.training.posterior_buffer import PosteriorBuffer, RestoreOptions, Teacher
from sdxl_ambient.training.run import Data, Run, RunSettings
from sdxl_ambient.training.settings import objective_settings, restore_settings
from sdxl_ambient.training.step import TrainingStep
from sdxl_ambient.training.validation import Validation, ValidationSettings
from sdxl_ambient.training.weights import BaseModel, WeightSettings

__all__ = [
    "BaseModel",
    "EMA",
    "CleanLevels",
    "Data",
    "ExtraBatch",
    "ExtraSource",
    "Interrupted",
    "Interruption",
    "PosteriorBuffer",
    "RestoreOptions",
    "Run",
    "RunSettings",
    "Teacher",
    "TrainableModel",
    "TrainingStep",
    "Validation",
    "ValidationSettings",
    "WeightSettings",
    "check_checkpoint",
    "checkpoints",
    "find_checkpoint",
    "load_trainable",
    "make_optimizer",
    "objective_settings",
    "restore_settings",
    "save_checkpoint",
]
