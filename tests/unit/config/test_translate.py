"""Other trainers' commands in our YAML, and what is said of options that are not ours."""

import json
import re

import pytest
import yaml

from sdxl_ambient.config.migration import SCRIPTS, answer, find, table
from sdxl_ambient.config.parser import build_options, load_options
from sdxl_ambient.config.training import TrainOptions
from sdxl_ambient.errors import OptionError
from sdxl_ambient.translate import main, translate

KOHYA = """accelerate launch --num_cpu_threads_per_process 1 sd-scripts/sdxl_train_network.py
  --pretrained_model_name_or_path=/models/base --network_module networks.lora --network_dim 16 --network_alpha 8
  --optimizer_type AdamW8bit --learning_rate 1e-4 --cache_latents --max_train_steps 1000 --mixed_precision bf16
  --resolution 1024,1024 --train_data_dir "my images" --output_dir out --noise_offset 0.05 --lr_scheduler cosine
  --min_snr_gamma 5 --unheard_of 3"""


def test_the_shipped_table_is_the_pages():
    from tests.integration.test_migrating import tables

    rows = []
    for peer, (_, page) in zip(("diffusers", "kohya"), tables().items(), strict=True):
        for theirs, scripts, ours, note in page:
            name = theirs.strip("`-")
            here = {"same": name, "–": None}.get(ours, ours.strip("`-"))
            rows.append((name, peer, scripts, here, note))
    assert [(f.name, f.peer, f.scripts, f.here, f.note) for f in table()] == rows
    assert {letter for one in table() for letter in one.scripts.split()} == {letter for _, letter in SCRIPTS.values()}


def test_a_kohya_command_becomes_our_yaml():
    done = translate([KOHYA])
    assert done.values == {
        "pretrained_model_name_or_path": "/models/base", "rank": 16, "lora_alpha": 8.0, "optimizer": "adamw8bit",
        "learning_rate": 1e-4, "max_train_steps": 1000, "mixed_precision": "bf16", "resolution": 1024,
        "train_data_dir": "my images", "output_dir": "out", "lr_scheduler": "cosine", "snr_gamma": 5.0,
    }  # fmt: skip
    left = dict(done.left)
    assert left["--cache_latents"] == "always, and on disk (--latents_dir)"
    assert left["--unheard_of 3"] == "no flag of sdxl_train_network.py that is known"
    assert {flag.split()[0] for flag in left} == {"--network_module", "--cache_latents", "--noise_offset", "--unheard_of"}
    text = done.yaml()
    assert yaml.safe_load(text) == done.values and text.count("\n# ") == len(done.notes) + len(done.left) + 1
    assert "(--latents_dir)" in text and "`" not in text


def test_what_it_writes_is_read_by_the_trainer(tmp_path, emoji, miniature):
    command = KOHYA.replace("/models/base", str(miniature)).replace('"my images"', f"'{emoji}'")
    command = command.replace("--output_dir out", f"--output_dir {tmp_path / 'out'}").replace("AdamW8bit", "AdamW")
    assert main([command, "--output", str(tmp_path / "mine.yaml")]) == 0
    options = load_options(TrainOptions, ["--config_file", str(tmp_path / "mine.yaml")])
    assert (options.rank, options.lora_alpha, options.optimizer, options.resolution) == (16, 8, "adamw", 1024)
    assert main([command, "--output", str(tmp_path / "mine.yaml")]) == 2  # nothing is overwritten


def test_a_diffusers_command_and_a_full_fine_tune():
    done = translate(["accelerate", "launch", "train_text_to_image_sdxl.py", "--train_batch_size", "4", "--use_ema"])
    assert done.values == {"train_batch_size": 4, "use_ema": True, "finetune": "full"}


FILES = {"config_file", "dataset_config"}  # read, and so looked for


@pytest.mark.parametrize("flag", [f for f in table() if f.name not in FILES], ids=lambda flag: f"{flag.peer}-{flag.name}")
def test_every_flag_of_the_table_has_an_answer(flag):
    script = next(s for s, (peer, letter) in SCRIPTS.items() if peer == flag.peer and letter in flag.scripts.split())
    done = translate([f"{script} --{flag.name} 1"])
    assert (done.values.keys() - {"finetune"}) or done.left
    if flag.here is None:
        assert done.left[0][1] and not done.values.keys() - {"finetune"}


def test_a_toml_file_is_read(tmp_path):
    (tmp_path / "kohya.toml").write_text(
        '[model]\npretrained_model_name_or_path = "/m"\nv2 = false\n[training]\nmax_train_steps = 50\nnetwork_dim = 4\n'
        'cache_latents = true\n[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "images"\n'
    )
    done = translate([str(tmp_path / "kohya.toml")])
    assert done.values["max_train_steps"] == 50 and done.values["rank"] == 4 and done.values["resolution"] == 512
    assert "--cache_latents" in dict(done.left) and "--v2" not in json.dumps(done.left)
    (tmp_path / "broken.toml").write_text("[a\n")
    with pytest.raises(OptionError, match="is no TOML file"):
        translate([str(tmp_path / "broken.toml")])


@pytest.mark.parametrize(
    ("command", "message"),
    [("python other.py --a 1", "it names none of"), ("sdxl_train.py a --b", "'a' belongs to no flag")],
)
def test_what_is_no_command_is_one_line(command, message):
    with pytest.raises(OptionError, match=message):
        translate([command])


# -- unknown options --------------------------------------------------------------------------------------------------

ANSWERS = {
    "cache_latents": "'cache_latents', which kohya has, is not here: always, and on disk (--latents_dir)",
    "network_dim": "'network_dim' of kohya is 'rank' here",
    "instance_data_dir": "'instance_data_dir' of diffusers is 'train_data_dir' here",
    "noise_offset": "'noise_offset', which diffusers has, is not here: the noise must be the schedule's own",
    "rnak": "unknown option 'rnak'; did you mean 'rank'?",
    "xyzzy": "unknown option 'xyzzy'",
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_unknown_option_answers_from_the_table_before_the_distance(name):
    for raised in (
        lambda: load_options(TrainOptions, [f"--{name}", "1"]),
        lambda: build_from_file(name),
    ):
        with pytest.raises(OptionError, match=re.escape(ANSWERS[name])) as error:
            raised()
        assert "clean_latents_dir" not in str(error.value) and "noise_key_file" not in str(error.value)


def build_from_file(name):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.yaml").write_text(f"{name}: 1\n")
        load_options(TrainOptions, ["--config_file", f"{folder}/a.yaml"])


def test_all_unknown_options_are_told_at_once():
    with pytest.raises(OptionError) as error:
        load_options(TrainOptions, ["--network_dim", "8", "--rnak=3", "--cache_latents", "--network_dim", "8"])
    told = str(error.value)
    assert told.count(";") >= 2 and all(name in told for name in ("network_dim", "rnak", "cache_latents"))
    assert told.count("network_dim") == 1 and "\n" not in told


def test_a_name_that_is_ours_is_never_another_trainers():
    assert answer("rank", {"rank"}) is None and find("rank").here == "rank"
    with pytest.raises(OptionError, match="--rank: 'x' is not a whole number"):
        build_options(TrainOptions, {"rank": "x"})
