"""The optimizers by name, and the packages that they need."""

import pytest

from sdxl_ambient.models.denoiser import Denoiser

PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "adamw_schedulefree": "schedulefree"}
NAMES = ("adamw", "adamw8bit", "adafactor", "prodigy", "adamw_schedulefree")


def needs(name):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])


def loss_of(unet, batch):
    return Denoiser(unet, batch[2])(batch[0], batch[1]).square().mean()
