"""Exponentially averaged weights of what is trained."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel


class Average:
    """Exponential moving average of the weights that are trained; called, it is the module with the averaged weights.

    It draws the samples that training needs of the model itself: without graph only, in evaluation mode.
    """

    def __init__(self, module: torch.nn.Module, decay: float):
        self.module = module
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.ema = EMAModel(self.parameters, decay=decay, foreach=True)

    def update(self) -> None:
        """After every optimizer step."""
        self.ema.step(self.parameters)

    @contextmanager
    def weights(self):
        """Within it, the module has the averaged weights and is in evaluation mode. Nothing is copied."""
        was_training = self.module.training
        self._swap()
        self.module.eval()
        try:
            yield
        finally:
            self._swap()
            self.module.train(was_training)

    @torch.no_grad()
    def __call__(self, *args, **keywords):
        with self.weights():
            return self.module(*args, **keywords)

    def _swap(self) -> None:
        for parameter, shadow in zip(self.parameters, self.ema.shadow_params, strict=True):
            parameter.data, shadow.data = shadow.data, parameter.data

    def state_dict(self) -> dict:
        return self.ema.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.ema.load_state_dict(state)
        self.ema.shadow_params = [
            s.to(p.device, p.dtype) for s, p in zip(self.ema.shadow_params, self.parameters, strict=True)
        ]
