"""Names that notebooks, benchmarks and other projects build on: they can be imported, and are called as they were.

After a change that is meant to, this file, run as a script, writes public_names.json anew.
"""

import importlib
import inspect
import json
from dataclasses import fields
from pathlib import Path

import pytest

from sdxl_ambient.config.training import TrainOptions

STORED = Path(__file__).with_name("public_names.json")
NAMES = {
    "sdxl_ambient.noise": [
        "NoiseSchedule.from_scheduler", "NoiseSchedule.alpha", "NoiseSchedule.sigma", "NoiseSchedule.observe",
        "NoiseSchedule.renoise", "NoiseSchedule.epsilon", "NoiseSchedule.x_0", "NoiseSchedule.expected_x_n",
        "NoiseSchedule.ambient_scale", "NoiseSchedule.reverse_step",
    ],
    "sdxl_ambient.objective": ["ambient_objective", "ObjectiveOptions"],
    "sdxl_ambient.pipeline": ["sample", "load_pipeline"],
    "sdxl_ambient.latents": ["build_store"],
    "eval.neighbours": ["nearest", "search"],
}  # fmt: skip
COMMANDS = (
    "sdxl_ambient.latents", "sdxl_ambient.preview", "sdxl_ambient.privacy", "sdxl_ambient.annotate", "sdxl_ambient.loop",
    "sdxl_ambient.export", "sdxl_ambient.hub", "sdxl_ambient.option_table", "sdxl_ambient.option_template",
    "eval.memorization", "eval.generate", "eval.embed", "eval.attack", "eval.report",
    "benchmarks.study", "benchmarks.train_miniature", "benchmarks.exactness", "benchmarks.neighbours",
)  # fmt: skip


def metrics() -> list[str]:
    module = importlib.import_module("eval.metrics")
    return sorted(
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and not name.startswith("_") and value.__module__ == module.__name__
    )


def signature(module: str, name: str) -> list[str]:
    """The parameters, each as its kind, its name and whether it may be left out."""
    value = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    marks = {
        inspect.Parameter.KEYWORD_ONLY: "*",
        inspect.Parameter.VAR_KEYWORD: "**",
        inspect.Parameter.VAR_POSITIONAL: "*args ",
    }
    return [
        f"{marks.get(p.kind, '')}{p.name}{'' if p.default is inspect.Parameter.empty else '='}"
        for p in inspect.signature(value).parameters.values()
    ]


def current() -> dict:
    names = {**NAMES, "eval.metrics": metrics()}
    signatures = {f"{module}.{name}": signature(module, name) for module, own in names.items() for name in own}
    return {"signatures": signatures, "flags": sorted(field.name for field in fields(TrainOptions))}


def test_public_names_are_called_as_they_were():
    stored, now = json.loads(STORED.read_text()), current()
    assert now["signatures"] == stored["signatures"]


def test_no_flag_of_the_script_is_lost():
    assert set(json.loads(STORED.read_text())["flags"]) <= set(current()["flags"])


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_have_a_main(name):
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    assert callable(module.main)


if __name__ == "__main__":
    STORED.write_text(json.dumps(current(), indent=1) + "\n")
