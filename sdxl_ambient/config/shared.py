"""Options that several commands have, each declared once, and the checks that go with them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sdxl_ambient.config.parser import option
from sdxl_ambient.errors import OptionError


def check_levels(t_n: list[int]) -> None:
    """One level or more, each once; an OptionError else."""
    if not t_n:
        raise OptionError("--t_n: a value is required, one timestep or more")
    twice = [t for t in t_n if t_n.count(t) > 1]
    if twice:
        raise OptionError(f"--t_n: {twice[0]} is given twice; allowed is each level once")


@dataclass
class ModelOptions:
    """Base model"""

    pretrained_model_name_or_path: str | None = option(
        None, "base model: a local directory in diffusers format, or a name on the Hub"
    )
    pretrained_vae_model_name_or_path: str | None = option(None, "another VAE than the base model's own")
    revision: str | None = option(None, "branch, tag or commit of the base model on the Hub")
    variant: str | None = option(None, "variant of the weight files, such as fp16")

    def validate(self) -> None:
        if not self.pretrained_model_name_or_path:
            raise OptionError("--pretrained_model_name_or_path: a value is required, a directory or a Hub name")


def check_writable(name: str, folder: str) -> None:
    """A folder that can be made or written into; an OptionError else. Makes nothing."""
    path = Path(folder).resolve()
    if path.exists() and not path.is_dir():
        raise OptionError(f"--{name}: {folder!r} is a file, a folder is needed")
    while not path.exists():
        path = path.parent
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise OptionError(f"--{name}: {folder!r} can not be written to")
