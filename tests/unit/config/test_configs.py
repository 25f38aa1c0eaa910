"""Every shipped configuration loads, and says with which command it is used and what comes of it."""

import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from support.pictures import REPOSITORY

from eval.options import MemorizationOptions
from sdxl_ambient.config.data import LatentsOptions
from sdxl_ambient.config.parser import load_options, read_yaml
from sdxl_ambient.config.reference import option_template
from sdxl_ambient.config.training import TrainOptions
from sdxl_ambient.option_template import main
from sdxl_ambient.training.settings import objective_settings

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
ACCELERATE = sorted((REPOSITORY / "configs/accelerate").glob("*.yaml"))
FOLDERS = ("train_data_dir", "heldout_data_dir", "latents_dir", "output_dir", "generated_dir", "lora", "unet", "checkpoints")
PROGRAMS = {
    "train_sdxl_ambient.py": TrainOptions,
    "eval.memorization": MemorizationOptions,
    "sdxl_ambient.latents": LatentsOptions,
}


def head(path: Path) -> str:
    """The comment at a file's top, without its number signs."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:])
    return "\n".join(lines)


def command(path: Path) -> tuple[str, list[str], list[str]]:
    """The command in a configuration's head: the program, its arguments, and those of accelerate launch."""
    joined = head(path).replace("\\\n", " ")
    (found,) = re.findall(r"^   (accelerate launch .*|python -m .*)$", joined, re.M)
    words = shlex.split(found.removesuffix(":"))
    at = next(i for i, word in enumerate(words) if word in PROGRAMS)
    return words[at], words[at + 1 :], words[2:at] if words[0] == "accelerate" else []


def flags(arguments: list[str]) -> dict[str, list[str]]:
    """Arguments by flag."""
    given, name = {}, None
    for word in arguments:
        if word.startswith("--"):
            name = word[2:]
            given[name] = []
        else:
            given[name].append(word)
    return given


@pytest.fixture
def any_machine(monkeypatch):
    """A machine with CUDA and every optional package, as far as options look."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: real(name, *a) or object())


def load(path: Path, tmp_path: Path):
    """A configuration as its own command loads it, with folders that are there in place of the user's."""
    program, arguments, _ = command(path)
    given = {name: values for name, values in flags(arguments).items() if name not in (*FOLDERS, "config_file")}
    values = read_yaml(path)
    used = [name for name in FOLDERS if name in values or name in flags(arguments)]
    for name in used:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        given[name] = [str(folder)]
    if program == "eval.memorization":
        given["lora"] = [f"{n}={weights(tmp_path / n)}" for n in ("noisy", "clean")]
        given["pretrained_model_name_or_path"] = [str(REPOSITORY / "miniature/pipeline")]
        if path.name == "mini_eval.yaml":
            given["train_data_dir"], given["heldout_data_dir"] = (
                [values[n]] for n in ("train_data_dir", "heldout_data_dir")
            )
    argv = [word for name, words in given.items() for word in (f"--{name}", *words)]
    return load_options(PROGRAMS[program], ["--config_file", str(path), *argv])


def weights(folder: Path) -> Path:
    """The header of a LoRA is all that options look at."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file({"unet.x.lora_A.weight": torch.zeros(1, 1)}, folder / "pytorch_lora_weights.safetensors")
    return folder


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_configuration_loads_with_only_its_folders_changed(path, tmp_path, any_machine, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    options = load(path, tmp_path)
    for name, value in read_yaml(path).items():
        if name not in (*FOLDERS, "pretrained_model_name_or_path", "preset", "t_n"):
            got = getattr(options, name)
            assert got == value or [got] == value or float(got) == float(value), name
    if isinstance(options, TrainOptions):
        objective_settings(options)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_configuration_says_its_command_and_what_comes_of_it(path):
    program, arguments, launch = command(path)
    given = flags(arguments)
    assert given["config_file"] == [f"configs/{path.name}"]
    names = {f.name for f in dataclasses.fields(PROGRAMS[program])} | {"config_file"}
    assert not set(given) - names
    assert "output_dir" in given
    if launch:
        (file,) = flags(launch)["config_file"]
        assert REPOSITORY / file in ACCELERATE
    assert re.search(r"^ Expected: \w+", head(path), re.M)
    assert all(len(line) <= 125 for line in path.read_text(encoding="utf-8").splitlines())


def test_the_papers_runs_are_the_papers():
    """arXiv 2404.10177: rank 4, batch 16, learning rate 1e-5, fp16, 200,000 steps; consistency in the last 50,000."""
    reported = {
        "ffhq_clean": "9.93", "ffhq_t100": "14.95", "ffhq_t500": "19.82", "ffhq_t800": "29.19",
        "ffhq_t100_consistency": "11.04", "ffhq_t500_consistency": "11.26", "ffhq_t800_consistency": "20.26",
    }  # fmt: skip
    found = {p.stem: read_yaml(p) for p in CONFIGS if p.stem.startswith("ffhq_") and p.stem != "ffhq_eval"}
    assert found.keys() == reported.keys()
    for name, values in found.items():
        path = REPOSITORY / f"configs/{name}.yaml"
        assert f"the paper reports FID {reported[name]} (" in head(path) and "Not measured here." in head(path)
        assert values["rank"] == 4 and values["train_batch_size"] == 16 and float(values["learning_rate"]) == 1e-5
        assert values["mixed_precision"] == "fp16" and values["max_train_steps"] == 200_000
        level = re.search(r"_t(\d+)", name)
        assert values["t_n"] == (int(level.group(1)) if level else "none")
        if name.endswith("_consistency"):
            assert values["consistency_start"] == 150_000 and values["consistency_space"] == "x_0"
            assert float(values["consistency_weight"]) == (1e-4 if values["t_n"] == 800 else 0.01)
        else:
            assert values["low_noise"] == "skip"


def test_the_template_holds_every_option_with_its_default(tmp_path, capsys):
    # python -m sdxl_ambient.option_template configs/template.yaml
    assert (REPOSITORY / "configs/template.yaml").read_text() == option_template()
    assert main([str(tmp_path / "written.yaml")]) == 0 and (tmp_path / "written.yaml").read_text() == option_template()
    assert main([]) == 2 and "usage:" in capsys.readouterr().err
    text = re.sub(r"^#(\w+: )", r"\1", option_template(), flags=re.M)
    (tmp_path / "all.yaml").write_text(text)
    values = read_yaml(tmp_path / "all.yaml")
    assert list(values) == list(dict.fromkeys(values))
    assert set(values) == {f.name for f in dataclasses.fields(TrainOptions)}
    (tmp_path / "images").mkdir()
    given = ["--pretrained_model_name_or_path", "x", "--train_data_dir", str(tmp_path / "images")]
    given += ["--output_dir", str(tmp_path / "out")]
    assert load_options(TrainOptions, ["--config_file", str(tmp_path / "all.yaml"), *given]) == load_options(
        TrainOptions, given
    )


# -- accelerate ----------------------------------------------------------------------


def launched(path: Path, *more: str):
    """accelerate launch's own view of a configuration."""
    return _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), *more, "script.py"]))[0]


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda p: p.stem)
def test_accelerate_reads_its_configurations(path):
    config = load_config_from_file(str(path))
    kinds = {
        "cpu": DistributedType.NO,
        "one_gpu": DistributedType.NO,
        "multi_gpu": DistributedType.MULTI_GPU,
        "fsdp": DistributedType.FSDP,
        "deepspeed_zero2": DistributedType.DEEPSPEED,
        "deepspeed_zero3": DistributedType.DEEPSPEED,
    }
    assert config.distributed_type == kinds.get(path.stem, DistributedType.FSDP)
    assert config.mixed_precision == ("no" if "cpu" in path.stem else "bf16")
    assert config.num_machines == 1 and path.read_text().startswith("# ")
    assert all(len(line) <= 125 for line in path.read_text(encoding="utf-8").splitlines())
    # accelerate takes unknown keys of these mappings without a word.
    known = vars(launch_command_parser().parse_args(["script.py"]))
    unknown = [k for k in [*config.fsdp_config, *config.deepspeed_config] if k not in known]
    assert not unknown


def test_fsdp_wraps_the_blocks_of_the_unet(miniature, unet, monkeypatch):
    path = REPOSITORY / "configs/accelerate/fsdp.yaml"
    arguments = launched(path, "--num_processes", "2")
    assert arguments.use_fsdp and arguments.mixed_precision == "bf16"
    for name, value in prepare_multi_gpu_env(arguments).items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    plugin.set_auto_wrap_policy(unet)
    blocks = {type(module).__name__: type(module) for module in unet.modules()}
    wrapped = {blocks[name] for name in plugin.transformer_cls_names_to_wrap}
    inside = sum(p.numel() for m in unet.modules() if type(m) in wrapped for p in m.parameters())
    assert inside > 0.8 * sum(p.numel() for p in unet.parameters())


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_is_coherent(stage):
    path = REPOSITORY / f"configs/accelerate/deepspeed_zero{stage}.yaml"
    config = load_config_from_file(str(path)).deepspeed_config
    assert config["zero_stage"] == stage
    assert config.get("zero3_save_16bit_model", False) is (stage == 3)
    # What the script's own options say must not be said here too: accelerate would take this.
    assert not {"gradient_accumulation_steps", "deepspeed_config_file"} & config.keys()
    assert "gradient_clipping" not in config  # the script tells it --max_grad_norm
    if importlib.util.find_spec("deepspeed") is None:
        return
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin(**config)
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == stage


def test_no_configuration_names_a_place_of_this_machine():
    for path in (*CONFIGS, *ACCELERATE):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.])/(home|root|work|tmp|mnt|data)/", text), path
        assert yaml.safe_load(text) is None or isinstance(yaml.safe_load(text), dict)
