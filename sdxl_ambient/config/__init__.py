"""Options: typed, checked, from flags and YAML. Nothing here imports torch or another large library."""

from sdxl_ambient.config.data import DataOptions, LatentsOptions
from sdxl_ambient.config.groups import (
    HubOptions,
    LifeOptions,
    LossOptions,
    OptimizerOptions,
    WatchOptions,
    WeightOptions,
    require,
)
from sdxl_ambient.config.parser import build_options, load_options, option, parse_options, read_yaml, redeclare
from sdxl_ambient.config.shared import (
    DTYPES,
    DeviceOptions,
    ImageOptions,
    LevelOptions,
    LoraOrUnetOptions,
    ModelOptions,
    PrecisionOptions,
    ReconstructionOptions,
    SeedOptions,
    check_writable,
)
from sdxl_ambient.config.training import FolderOptions, TrainOptions

__all__ = [
    "DTYPES",
    "DataOptions",
    "DeviceOptions",
    "FolderOptions",
    "HubOptions",
    "ImageOptions",
    "LatentsOptions",
    "LevelOptions",
    "LifeOptions",
    "LoraOrUnetOptions",
    "LossOptions",
    "ModelOptions",
    "OptimizerOptions",
    "PrecisionOptions",
    "ReconstructionOptions",
    "SeedOptions",
    "TrainOptions",
    "WatchOptions",
    "WeightOptions",
    "build_options",
    "check_writable",
    "load_options",
    "option",
    "parse_options",
    "read_yaml",
    "redeclare",
    "require",
]
