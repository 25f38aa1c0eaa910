"""Typed options: where values come from, and one clear line for each wrong one."""

from dataclasses import dataclass

import pytest

from sdxl_ambient.config.parser import load_options, option, parse_options
from sdxl_ambient.errors import OptionError


@dataclass
class Options:
    name: str | None = option(None, "a name")
    steps: int = option(10, "steps", minimum=1, maximum=100)
    rate: float = option(1e-3, "learning rate", above=0)
    level: int | None = option(500, "noise level", minimum=0)
    precision: str = option("no", "precision", choices=("no", "bf16"))
    flag: bool = option(False, "a flag")
    prompts: list[str] = option([], "prompts")

    def validate(self):
        if self.name == self.precision:
            raise OptionError("--name: must differ from --precision")


def load(tmp_path, text=None, *argv):
    argv = list(argv)
    if text is not None:
        (tmp_path / "c.yaml").write_text(text)
        argv += ["--config_file", str(tmp_path / "c.yaml")]
    return load_options(Options, argv)


def test_defaults_then_yaml_then_flags(tmp_path):
    assert load(tmp_path) == Options()
    text = "steps: 20\nrate: 1e-4\nprompts: [a, 'b c']\nflag: true\n"
    assert load(tmp_path, text) == Options(steps=20, rate=1e-4, prompts=["a", "b c"], flag=True)
    got = load(tmp_path, text, "--steps", "30", "--prompts", "x y", "z", "--flag=false", "--rate=5")
    assert got == Options(steps=30, rate=5.0, prompts=["x y", "z"], flag=False)
    assert load(tmp_path, "") == Options()
    assert load(tmp_path, "prompts: one") == Options(prompts=["one"])


def test_lists_are_not_shared_between_options(tmp_path):
    load(tmp_path).prompts.append("x")
    assert load(tmp_path).prompts == []


@pytest.mark.parametrize("word", ["none", "None", "null", "~"])
def test_none_is_spelled_in_yaml_and_flags(tmp_path, word):
    assert load(tmp_path, f"level: {word}\n").level is None
    if word != "~":
        assert load(tmp_path, None, "--level", word).level is None


def test_no_is_a_text_where_a_text_is_wanted(tmp_path):
    """In YAML 1.1 a bare no is false; --mixed_precision has a value "no"."""
    assert load(tmp_path, "precision: no\n").precision == "no"
    for word, value in (("yes", True), ("no", False), ("on", True), ("false", False), ("True", True)):
        assert load(tmp_path, f"flag: {word}\n").flag is value
        assert load(tmp_path, None, "--flag", word).flag is value
    assert load(tmp_path, None, "--flag").flag is True


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("steps", "3.5", "--steps: {} is not a whole number"),
        ("steps", "many", "--steps: 'many' is not a whole number"),
        ("steps", "inf", "--steps: {} is not a whole number"),
        ("steps", "0", "--steps: 0 is below the smallest allowed value, 1"),
        ("steps", "101", "--steps: 101 is above the largest allowed value, 100"),
        ("steps", "none", "--steps: 'none' is not a whole number"),
        ("rate", "0", "--rate: 0.0 is not above 0"),
        ("rate", "-1", "--rate: -1.0 is not above 0"),
        ("rate", "nan", "--rate: nan is not finite"),
        ("rate", "1e999", "--rate: inf is not finite"),
        ("rate", "fast", "--rate: 'fast' is not a number"),
        ("level", "-1", "--level: -1 is below the smallest allowed value, 0"),
        ("precision", "fp8", "--precision: 'fp8' is not one of no, bf16"),
        ("flag", "maybe", "--flag: 'maybe' is not true or false"),
        ("name", "no", "--name: must differ from --precision"),
        ("stepz", "3", "unknown option 'stepz'; did you mean 'steps'?"),
        ("xyzzy", "3", "unknown option 'xyzzy'"),
    ],
)
def test_each_wrong_value_is_named_in_one_line(tmp_path, capsys, key, value, message):
    for text, argv in ((f"{key}: {value}\n", ()), (None, (f"--{key}", value)), (None, (f"--{key}={value}",))):
        with pytest.raises(OptionError) as error:
            load(tmp_path, text, *argv)
        shown = str(error.value)
        assert "\n" not in shown
        for part in message.split("{}"):
            assert part in shown
        assert value.rstrip("0") in shown or value in shown or key not in ("steps", "flag")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must hold 'option: value' lines, not list"),
        ("steps: [1\n", "is not valid YAML"),
        ("steps: [1, 2]\n", r"--steps: \[1, 2\] is not a whole number"),
        ("name: {a: b}\n", "--name: {'a': 'b'} is not a text"),
        ("steps:\n", "--steps: a value is required, a whole number"),
        ("steps: true\n", "--steps: True is not a whole number"),
        ("3: 4\n", "unknown option '3'"),
        ("steps: 1\nname: a\nsteps: 2\n", "'steps' is given twice"),
        ("name: {<<: {a: b}}\n", "--name: {'a': 'b'} is not a text"),
    ],
)
def test_broken_files_are_named_in_one_line(tmp_path, text, message):
    with pytest.raises(OptionError, match=message) as error:
        load(tmp_path, text)
    assert "\n" not in str(error.value)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(OptionError, match="can not read .*nothing.yaml.*: No such file"):
        load(tmp_path, None, "--config_file", str(tmp_path / "nothing.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00steps")
    with pytest.raises(OptionError, match="binary.yaml"):
        load(tmp_path, None, "--config_file", str(tmp_path / "binary.yaml"))


def test_stray_and_incomplete_arguments_are_refused(tmp_path):
    for argv in (["stray"], ["--steps"], ["-steps", "3"], ["--step", "3"]):
        with pytest.raises(OptionError):
            load(tmp_path, None, *argv)


def test_entry_points_print_one_line_and_exit_with_2(capsys):
    with pytest.raises(SystemExit) as exit:
        parse_options(Options, ["--stepps", "3"], prog="tool")
    assert exit.value.code == 2
    assert capsys.readouterr().err == "tool: error: command line: unknown option 'stepps'; did you mean 'steps'?\n"


def test_help_names_every_option_its_default_and_choices(capsys):
    with pytest.raises(SystemExit) as exit:
        parse_options(Options, ["--help"], prog="tool")
    assert exit.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("--config_file YAML", "--steps INT", "[default: 10]", "(one of: no, bf16)", "--flag", "[default: 0.0"):
        assert part in shown


def test_a_list_given_twice_is_refused_and_the_last_single_value_wins():
    from sdxl_ambient.config.training import TrainOptions

    with pytest.raises(OptionError, match="--lora_targets: given twice"):
        load_options(TrainOptions, ["--lora_targets", "all", "--lora_targets", "linear"])
    base = ["--pretrained_model_name_or_path", "x", "--train_data_dir", "tests", "--output_dir", "runs/nothing"]
    assert load_options(TrainOptions, [*base, "--rank", "4", "--rank", "8"]).rank == 8
