"""docs/MIGRATING.md: every option that it names is there, and every flag has an answer."""

import dataclasses
import re

import pytest
from support.pictures import REPOSITORY

from eval.options import MemorizationOptions
from sdxl_ambient.config.data import LatentsOptions
from sdxl_ambient.config.training import TrainOptions
from sdxl_ambient.export import ExportOptions

PAGE = (REPOSITORY / "docs/MIGRATING.md").read_text(encoding="utf-8")
OURS = {f.name for cls in (TrainOptions, LatentsOptions, MemorizationOptions) for f in dataclasses.fields(cls)} | {
    "config_file"
}
TRAINING = {f.name for f in dataclasses.fields(TrainOptions)} | {"config_file"}
EXPORT = {f.name for f in dataclasses.fields(ExportOptions)}
SCRIPTS = {"diffusers": {"L", "D", "F"}, "kohya sd-scripts": {"N", "F"}}


def tables() -> dict[str, list[list[str]]]:
    """Rows of each peer's tables: their flag, its scripts, our column, the note."""
    found = {}
    for title, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
        found[title] = [row for row in rows if row[0] != "theirs" and not set(row[0]) <= set("-")]
    return found


ROWS = [(peer, *row) for peer, rows in tables().items() for row in rows]


def test_both_peers_are_there():
    assert tables().keys() == SCRIPTS.keys()
    assert len(tables()["diffusers"]) > 80 and len(tables()["kohya sd-scripts"]) > 150
    for peer, rows in tables().items():
        flags = [row[0] for row in rows]
        assert len(flags) == len(set(flags)), peer


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0].split()[0]}-{row[1].strip('`-')}")
def test_a_row_answers(row):
    assert len(row) == 5
    peer, theirs, scripts, ours, note = row
    flag = re.fullmatch(r"`--([a-z0-9_]+)`", theirs).group(1)
    assert scripts and set(scripts.split()) <= SCRIPTS[peer]
    # A name that we share is marked so, and nothing else is.
    assert (ours == "same") == (flag in TRAINING)
    if ours == "–":
        assert len(note) > 3, "a flag that isn't here needs its reason"
    elif ours != "same":
        assert re.fullmatch(r"`--([a-z0-9_]+)`", ours).group(1) in OURS
    named = set(re.findall(r"--([a-z0-9_]+)", note))
    assert named <= OURS | EXPORT
    assert not named - OURS or "sdxl_ambient.export" in note


def test_the_flags_that_we_share_with_diffusers_are_marked_same():
    """Names that the examples have, as a list of their own: no row may get lost."""
    shared = """
        pretrained_model_name_or_path pretrained_vae_model_name_or_path revision variant dataset_name
        dataset_config_name train_data_dir image_column caption_column instance_prompt proportion_empty_prompts
        resolution center_crop random_flip output_dir seed rank lora_dropout use_dora train_text_encoder
        text_encoder_lr train_batch_size num_train_epochs max_train_steps gradient_accumulation_steps
        gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power
        prediction_type optimizer use_8bit_adam adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm snr_gamma
        use_ema mixed_precision allow_tf32 enable_xformers_memory_efficient_attention dataloader_num_workers
        checkpointing_steps checkpoints_total_limit resume_from_checkpoint validation_prompt
        num_validation_images logging_dir report_to push_to_hub hub_model_id
    """.split()
    assert set(shared) <= TRAINING
    same = {row[0].strip("`-") for row in tables()["diffusers"] if row[2] == "same"}
    assert same == set(shared)


def test_what_the_page_says_in_words_exists():
    prose = "\n".join(line for line in PAGE.splitlines() if not line.startswith("|"))
    assert set(re.findall(r"`--([a-z0-9_]+)", prose)) <= OURS | EXPORT
    for link in re.findall(r"\]\(([A-Z]+\.md)\)", PAGE):
        assert (REPOSITORY / "docs" / link).is_file(), link
    for file in re.findall(r"configs/[\w/]+\.yaml", PAGE):
        assert (REPOSITORY / file).is_file(), file
