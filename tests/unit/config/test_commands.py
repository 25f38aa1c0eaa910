"""All commands alike: options that say the same everywhere, help that comes at once, errors in one line."""

import configparser
import dataclasses
import importlib
import json
import subprocess
import sys
import types
import typing

import pytest
import torch
from support.commands import OPTIONS, WITHOUT_OPTIONS
from support.pictures import REPOSITORY, copy_emoji

from eval.choices import EMBEDDERS
from eval.embedders.registry import load_embedder
from sdxl_ambient import devices
from sdxl_ambient.config import DTYPES, parse_options
from sdxl_ambient.config.parser import default_of, groups
from sdxl_ambient.errors import StageError
from sdxl_ambient.export import LAYOUTS
from sdxl_ambient.formats import names

# Options that differ on purpose.
DIFFERENT = {
    "batch_size": "classifier steps, restored images and drawn images are counted",
    "dtype": "the tools leave the VAE in float32, eval has one precision for all networks, export stores in it",
    "heldout_data_dir": "training takes its held-out loss on it, eval its control",
    "latents_dir": "training makes the store, the loop only reads it",
    "learning_rate": "training's has a scheduler and other defaults than a small classifier's",
    "lora": "training starts from one, eval.memorization takes many by name",
    "near_duplicates": "a store can report, drop or refuse them; an evaluation can drop or keep them",
    "num_images": "reconstructed ones of a set, or drawn ones for each model",
    "output_dir": "each command says what it writes",
    "pretrained_model_name_or_path": "export needs the base for some formats alone",
    "resolution": "pictures are cropped to it, or drawn in it",
    "t_n": "the level of a store, of a restored store, or several to look at",
    "train_data_dir": "a store is also made of parquet and webdataset files; eval's is the fine-tuning set",
    "unet": "eval.memorization takes many by name",
}
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "datasets", "matplotlib", "faiss")


def declarations() -> dict[str, list[tuple[type, dataclasses.Field]]]:
    """By option: the classes that declare it themselves, with its field there."""
    classes = {part for cls in OPTIONS.values() for part in cls.__mro__ if dataclasses.is_dataclass(part)}
    found = {}
    for cls in sorted(classes, key=lambda c: (c.__module__, c.__name__)):
        for field in dataclasses.fields(cls):
            if field.name in cls.__annotations__:
                found.setdefault(field.name, []).append((cls, field))
    return found


def kind(cls: type, name: str) -> tuple:
    """An option's type without None: some commands require what others leave open."""
    hint = typing.get_type_hints(cls)[name]
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return tuple(a for a in typing.get_args(hint) if a is not type(None)) if union else (hint,)


def test_an_option_says_the_same_everywhere():
    said, commands = {}, {}
    for command, cls in OPTIONS.items():
        for field in dataclasses.fields(cls):
            rules = {k: v for k, v in field.metadata.items() if k != "redeclared"}
            said.setdefault(field.name, set()).add((kind(cls, field.name), *sorted(rules.items())))
            commands.setdefault(field.name, []).append(command)
    assert {name for name, versions in said.items() if len(versions) > 1} == set(DIFFERENT)
    once = {n: [c for c, f in where if "redeclared" not in f.metadata] for n, where in declarations().items()}
    assert once.keys() == said.keys()
    assert {name for name, classes in once.items() if len(classes) > 1} == set(DIFFERENT)
    # An option is never declared more often than it differs.
    assert all(len(once[name]) == len(said[name]) for name in said)
    assert all(len(commands[name]) > 1 for name in DIFFERENT)


def test_names_that_options_offer_are_what_the_libraries_know():
    assert tuple(devices.DTYPES) == DTYPES
    assert LAYOUTS == names.LAYOUTS
    for name in EMBEDDERS:  # an unknown one is refused by its name
        try:
            load_embedder(name, "./nowhere")
        except StageError as error:
            assert str(error).startswith("--embedder_weights"), name


# -- start-up --------------------------------------------------------------------------

PROBE = """
import json, runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as stop:
    assert not stop.code, stop.code
print(json.dumps(sorted(sys.modules)))
"""


@pytest.mark.parametrize("command", [*OPTIONS, *WITHOUT_OPTIONS])
def test_help_imports_no_large_library_and_says_nothing_on_stderr(command):
    run = subprocess.run([sys.executable, "-c", PROBE, command], capture_output=True, text=True, cwd=REPOSITORY)
    assert run.returncode == 0 and run.stderr == ""
    shown, modules = run.stdout.strip().rsplit("\n", 1)
    assert len(shown) > 40 and not set(HEAVY) & set(json.loads(modules))


# -- help ------------------------------------------------------------------------------


@pytest.mark.parametrize("command", OPTIONS)
def test_help_is_in_groups_with_choices_and_defaults(command, capsys):
    cls = OPTIONS[command]
    with pytest.raises(SystemExit) as stop:
        parse_options(cls, ["--help"], prog=command)
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and shown.startswith(f"usage: {command} [--config_file YAML] [--option VALUE ...]\n")
    found = groups(cls)
    titles = [title for title, _ in found]
    assert titles and all(title and not title.startswith("Options") and "``" not in title for title in titles)
    places = [shown.index(f"\n{title}:\n") for title in titles]
    assert places == sorted(places)
    assert [f.name for _, own in found for f in own] == [f.name for f in dataclasses.fields(cls)]
    for (_, own), start, end in zip(found, places, [*places[1:], len(shown)], strict=True):
        for field in own:
            (after,) = [p for p in shown[start:end].split("\n  --") if p.startswith(f"{field.name} ")]
            text, default = " ".join(after.split()), default_of(field)
            if "resume_from_checkpoint" in {f.name for _, own in found for f in own}:
                suffix = f" [on resume: {field.metadata['resume']}]"
                assert text.endswith(suffix)
                text = text.removesuffix(suffix)
            assert all(str(choice) in text for choice in field.metadata["choices"] or ())
            if default in (None, []):
                said = any(word in field.metadata["help"] for word in ("default", "without"))
                assert text.count("[default: none]") == field.metadata["help"].count("[default: none]") + (not said)
            else:
                words = str(default).lower() if isinstance(default, bool) else default
                words = " ".join(map(str, words)) if isinstance(words, list) else words
                assert text.endswith(f"[default: {words}]"), field.name


# -- errors ----------------------------------------------------------------------------

WITH_DEVICE = [name for name, cls in OPTIONS.items() if "device" in {f.name for f in dataclasses.fields(cls)}]


@pytest.mark.parametrize("device", ["mps", "meta", "gpu", "cuda:99"])
@pytest.mark.parametrize("command", WITH_DEVICE)
def test_a_device_that_is_none_is_refused_in_one_line_by_every_command(command, device, tmp_path, capsys):
    train, other = (copy_emoji(tmp_path / name, 2) for name in ("train", "other"))
    given = {
        "pretrained_model_name_or_path": REPOSITORY / "miniature/pipeline",
        "train_data_dir": train,
        "heldout_data_dir": other,
        "reference_data_dir": other,
        "trusted_data_dir": train,
        "untrusted_data_dir": other,
        "image_dir": train,
        "output_dir": tmp_path / "out",
        "device": device,
    }
    own = {f.name for f in dataclasses.fields(OPTIONS[command])}
    argv = [word for name, value in given.items() if name in own for word in (f"--{name}", str(value))]
    module = importlib.import_module(command if command.startswith("eval.") else f"{command}.__main__")
    with pytest.raises(SystemExit) as stop:
        module.main(argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    if device == "cuda:99":
        count = torch.cuda.device_count()
        assert said == f"{command}: error: --device: 'cuda:99' is not there; this machine has {count} CUDA GPUs\n"
    else:
        assert said == f"{command}: error: --device: {device!r} is not one of auto, cpu, cuda, cuda:N\n"


# -- entry points ----------------------------------------------------------------------


def test_console_scripts_and_packaged_files_are_there():
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    pairs = [line.split(" = ") for line in setup["options.entry_points"]["console_scripts"].split("\n") if line]
    names = "memorization generate attack embed report latents preview privacy annotate loop export hub".split()
    assert [name for name, _ in pairs] == [f"sdxl-ambient-{name}" for name in names]
    for name, target in pairs:
        module, function = target.split(":")
        main = getattr(importlib.import_module(module), function)
        assert callable(main) and main.__name__ == "main" and name.rsplit("-", 1)[1] in module
    for package, patterns in setup["options.package_data"].items():
        for pattern in patterns.split():
            assert list(REPOSITORY.joinpath(*package.split(".")).glob(pattern)), (package, pattern)
    assert all("py.typed" in setup["options.package_data"][package] for package in ("sdxl_ambient", "eval"))
