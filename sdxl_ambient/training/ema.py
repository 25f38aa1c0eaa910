"""Exponentially averaged weights of what is trained."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel


class EMA:
    """Exponential moving average of the weights that are trained; called, it is the module with the averaged weights.

    It draws the samples that training needs of the model itself: without graph only, in evaluation mode.

    Args:
        module: a module, or several modules and parameters (the UNet and the text encoders' LoRA); called is the first.
        offload: keep the averaged weights in the processor's memory (page-locked with a GPU), and update them there. Within
            :meth:`weights` they are copied in, weight by weight, so that the device never holds both.
    """

    def __init__(self, module: torch.nn.Module | list, decay: float, offload: bool = False):
        items = list(module) if isinstance(module, (list, tuple)) else [module]
        self.module, self.offload = items[0], offload
        self.modules = [i for i in items if isinstance(i, torch.nn.Module)]
        every = (p for i in items for p in (i.parameters() if isinstance(i, torch.nn.Module) else [i]))
        self.parameters = [p for p in dict.fromkeys(every) if p.requires_grad]
        self.ema = EMAModel([] if offload else self.parameters, decay=decay, foreach=True)
        if offload:
            self.ema.shadow_params = [self._placed(p.detach(), p) for p in self.parameters]

    def _placed(self, value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """A copy of ``value``, in the parameter's dtype, where averaged weights are kept."""
        if not self.offload:
            return value.to(parameter.device, parameter.dtype, copy=True)
        kept = torch.empty(value.shape, dtype=parameter.dtype, pin_memory=torch.cuda.is_available())
        return kept.copy_(value)

    @torch.no_grad()
    def update(self) -> None:
        """After every optimizer step."""
        if not self.offload:
            self.ema.step(self.parameters)
            return
        # The same on the processor, one weight at a time.
        self.ema.optimization_step += 1
        decay = self.ema.get_decay(self.ema.optimization_step)
        for shadow, parameter in zip(self.ema.shadow_params, self.parameters, strict=True):
            shadow.sub_(shadow - parameter.to(shadow.device), alpha=1 - decay)

    @contextmanager
    def weights(self):
        """Within it, the modules have the averaged weights and are in evaluation mode. Nothing is copied on the device."""
        was_training = [module.training for module in self.modules]
        self._swap()
        for module in self.modules:
            module.eval()
        try:
            yield
        finally:
            self._swap()
            for module, training in zip(self.modules, was_training, strict=True):
                module.train(training)

    @torch.no_grad()
    def __call__(self, *args, **keywords):
        with self.weights():
            return self.module(*args, **keywords)

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, shadow in zip(self.parameters, self.ema.shadow_params, strict=True):
            if self.offload:
                trained = parameter.data.to(shadow.device, copy=True)
                parameter.data.copy_(shadow)
                shadow.copy_(trained)
            else:
                parameter.data, shadow.data = shadow.data, parameter.data

    def state_dict(self) -> dict:
        return self.ema.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.ema.load_state_dict(state)
        self.ema.shadow_params = [self._placed(s, p) for s, p in zip(self.ema.shadow_params, self.parameters, strict=True)]
