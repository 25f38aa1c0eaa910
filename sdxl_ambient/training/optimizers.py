"""The optimizers of training by name, the weights a schedule-free one is evaluated with, and the fused backward pass."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from contextlib import contextmanager
from typing import Protocol, cast

import torch

from sdxl_ambient.errors import OptionError, one_line

# What other options say, so that it can't be said twice.
_OTHER_OPTIONS = {
    "lr": "--learning_rate",
    "betas": "--adam_beta1 and --adam_beta2",
    "weight_decay": "--adam_weight_decay",
    "eps": "--adam_epsilon",
    "warmup_steps": "--lr_warmup_steps",
}
# Of no use in a training run, or what the script decides.
_NOT_OFFERED = ("self", "params", "differentiable", "capturable", "optim_bits", "args", "relative_step", "warmup_init")


def _adamw():
    return torch.optim.AdamW


def _adamw8bit():
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit


def _adafactor():
    from transformers.optimization import Adafactor

    return Adafactor


def _prodigy():
    from prodigyopt import Prodigy

    return Prodigy


def _adamw_schedulefree():
    from schedulefree import AdamWScheduleFree

    class ExactScheduleFree(AdamWScheduleFree):
        """Trains on exactly the weights that it trained on before an evaluation; computed back, they would be rounded.

        In between they are kept as ``y`` in its state, one more copy of them. So a run with a checkpoint or a validation
        more is the same run, and so is one that is resumed.
        """

        @torch.no_grad()
        def eval(self):
            for group in (g for g in self.param_groups if g["train_mode"]):
                for p in (p for p in group["params"] if self.state[p]):
                    self.state[p]["y"] = p.clone()
            super().eval()

        @torch.no_grad()
        def train(self):
            super().train()
            for state, p in ((self.state[p], p) for group in self.param_groups for p in group["params"]):
                if "y" in state:
                    p.copy_(state.pop("y"))

        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            self.train()

    return ExactScheduleFree


_CLASSES = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "prodigy": _prodigy,
    "adamw_schedulefree": _adamw_schedulefree,
}


def parse_extra(pairs: list[str]) -> dict:
    """``--optimizer_args``: ``name=value``, where a value is a Python literal (number, true/false, None, tuple) or a word.

    Raises:
        OptionError: a pair of another form, or a name given twice.
    """
    arguments = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise OptionError(f"--optimizer_args: {pair!r} is not of the form name=value")
        if name in arguments:
            raise OptionError(f"--optimizer_args: {name} is given twice")
        try:
            arguments[name] = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(value, value))
        except (ValueError, SyntaxError):
            arguments[name] = value
    return arguments


def make_optimizer(
    name: str,
    groups: list[dict],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 1e-2,
    epsilon: float = 1e-8,
    warmup_steps: int = 0,
    extra: dict | None = None,
) -> torch.optim.Optimizer:
    """One of ``adamw``, ``adamw8bit``, ``adafactor``, ``prodigy``, ``adamw_schedulefree``.

    Args:
        groups: ``[{"params": […], "lr": …}, …]``, such as the UNet's and the text encoders'; without ``lr`` it is ``lr``.
        warmup_steps: for the schedule-free one alone, which has no scheduler.
        extra: more arguments of its constructor, from :func:`parse_extra`; they win over what is set here.

    Adafactor has no β and two ε of its own (``extra``: ``beta1``, ``eps``); it follows the learning rate that is given.
    Prodigy is set up as the diffusers examples do; it finds the rate itself, by which ``lr``, usually 1, is multiplied.

    Raises:
        OptionError: an unknown argument or a wrong value in ``extra``, or two learning rates where one is possible.
    """
    kind, extra = _CLASSES[name](), dict(extra or {})
    adam = dict(betas=betas, weight_decay=weight_decay, eps=epsilon)
    given = {
        "adamw": adam,
        "adamw8bit": adam,
        "adafactor": dict(weight_decay=weight_decay, scale_parameter=False, relative_step=False, warmup_init=False),
        "prodigy": dict(adam, decouple=True, use_bias_correction=True, safeguard_warmup=True),
        "adamw_schedulefree": dict(adam, warmup_steps=warmup_steps),
    }[name]
    _check_extra(name, kind, given, extra)
    if name == "prodigy" and (other := {g.get("lr", lr) for g in groups} - {lr}):
        raise OptionError(
            f"--text_encoder_lr: {min(other):g} excludes --optimizer prodigy; allowed is {lr:g}, as the UNet's"
        )
    try:
        # Groups are copied: an optimizer fills them with its own settings.
        optimizer = kind([{"lr": lr, **group} for group in groups], lr=lr, **{**given, **extra})
    except (TypeError, ValueError, RuntimeError) as error:
        if not extra:
            raise
        raise OptionError(f"--optimizer_args: {_shown(extra)}: {name} refuses it: {one_line(error, most=None)}") from None
    if name == "adamw_schedulefree":
        cast(ScheduleFree, optimizer).train()
    return optimizer


def _check_extra(name: str, kind: type, given: dict, extra: dict) -> None:
    of_options = {n: option for n, option in _OTHER_OPTIONS.items() if n == "lr" or n in given}
    known = [n for n in inspect.signature(kind.__init__).parameters if n not in (*_NOT_OFFERED, *of_options)]
    for argument in extra:
        if argument in of_options:
            raise OptionError(f"--optimizer_args: {argument} is given by {of_options[argument]}")
        if argument not in known:
            raise OptionError(f"--optimizer_args: {name} has no {argument!r}; allowed are {', '.join(sorted(known))}")


def _shown(extra: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in extra.items())


class ScheduleFree(Protocol):
    """What an optimizer that averages the weights itself has beside ``step``."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


@contextmanager
def evaluated(optimizer: torch.optim.Optimizer):
    """Within it, the weights are those to evaluate, export and store, not those that gradients are taken at.

    The two differ for ``adamw_schedulefree`` alone; with another optimizer this does nothing. ``optimizer`` may be wrapped
    by accelerate, and one of these may be inside another.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not any(group.get("train_mode") for group in inner.param_groups):
        yield
        return
    schedule_free = cast(ScheduleFree, inner)
    schedule_free.eval()
    try:
        yield
    finally:
        schedule_free.train()


class FusedBackward(torch.optim.Optimizer):
    """Steps each weight during the backward pass, as soon as its gradient is there, and frees that gradient.

    To schedulers, accelerate and checkpoints it is the optimizer that ``make`` gives, with its groups and its state: the
    learning rate is read from ``param_groups`` in every step, and a checkpoint of one can be resumed with the other. Its
    ``step`` and ``zero_grad`` do nothing, since all is done. Without clipping, the weights are bit for bit those of a usual
    step.

    For one process, without accumulation or a gradient scaler: a gradient is final when it arrives. Where a loss has
    several forward passes with graph, autograd itself holds sums until the earliest of them is reached.

    Raises:
        FloatingPointError: in the backward pass, at a gradient that is not finite. Its weight is as it was, and so are
            those whose gradients were still to come; those whose gradients came before are one step further. So the run
            must be resumed from a checkpoint. (One read-back per weight; ``check_finite=False`` leaves it out.)
    """

    def __init__(
        self,
        make: Callable[[list[dict]], torch.optim.Optimizer],
        groups: list[dict],
        names: dict[torch.nn.Parameter, str] | None = None,
        check_finite: bool = True,
    ):
        self.whole = make(groups)
        super().__init__(self.whole.param_groups, self.whole.defaults)
        self.names, self.check_finite = names or {}, check_finite
        self.single = {}
        for group in self.whole.param_groups:
            for p in group["params"]:
                one = make([{**group, "params": [p]}])
                self.single[p] = (one, group)
                p.register_post_accumulate_grad_hook(self._arrived)
        self._share()

    def _share(self) -> None:
        """One state and one set of groups for all; loading replaces both."""
        self.state, self.param_groups = self.whole.state, self.whole.param_groups
        for group in self.param_groups:
            for p in group["params"]:
                one = self.single[p][0]
                one.state = self.whole.state
                self.single[p] = (one, group)

    def _arrived(self, p: torch.nn.Parameter) -> None:
        assert p.grad is not None  # the hook is called once it has arrived
        if self.check_finite and not bool(torch.isfinite(p.grad).all()):
            raise FloatingPointError(
                f"the gradient of {self.names.get(p, f'a weight of shape {tuple(p.shape)}')} is not finite; "
                "weights before it are a step further, so go on from a checkpoint, with a lower --learning_rate"
            )
        one, group = self.single[p]
        one.param_groups[0].update((k, v) for k, v in group.items() if k != "params")
        one.step()
        p.grad = None

    def step(self, closure=None):
        """Nothing: done in the backward pass."""
        return closure() if closure is not None else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: each gradient is freed when its weight is updated."""

    def state_dict(self) -> dict:
        return self.whole.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        self.whole.load_state_dict(state_dict)
        self._share()
