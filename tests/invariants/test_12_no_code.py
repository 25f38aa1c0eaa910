"""Invariant 12: what is stored is checked when it is read, and nothing that is read can run code."""

import os
import pickle
import shutil

import pytest
from support.running import arguments, train_here
from support.stores import command

from sdxl_ambient.errors import CheckpointError, UserError
from sdxl_ambient.provenance import read_sealed, write_sealed
from sdxl_ambient.store.reader import LatentStore
from sdxl_ambient.training.checkpoint import check_checkpoint, check_trusted, find_checkpoint, hashes_of, signature


class Payload:
    """What a pickle runs when it is loaded: it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short training with everything that a checkpoint can hold."""
    from support.pictures import copy_emoji

    folder = tmp_path_factory.mktemp("run")
    options = {"low_noise": "restore", "restore_steps": 2, "max_train_steps": 2, "checkpointing_steps": 1, "use_ema": "true"}
    assert train_here(arguments(copy_emoji(folder / "emoji", 6), folder / "out", **options)) == 0
    return folder


def files_of(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != ".lock")


def test_a_payload_in_any_file_of_a_checkpoint_is_not_run(run, tmp_path, capsys):
    """It is passed over, and the one before is taken; nor does a list of files that agrees with it help."""
    marker, kept = tmp_path / "executed", run / "out/checkpoint-2"
    names = [*files_of(kept), "custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl", "scaler.pt"]
    assert len(names) > 8
    options = {"low_noise": "restore", "restore_steps": 2, "max_train_steps": 3, "checkpointing_steps": 9, "use_ema": "true"}
    for name in names:
        out = tmp_path / "out"
        shutil.copytree(run / "out", out, ignore=shutil.ignore_patterns("latents", "logs"))
        (out / "checkpoint-2" / name).write_bytes(pickle.dumps(Payload(marker)))
        if name != "checkpoint.json":
            with pytest.raises(CheckpointError) if name in files_of(kept) else nothing():
                check_checkpoint(out / "checkpoint-2")
            # Whoever can write the folder can write its list of files too.
            record = read_sealed(out / "checkpoint-2/checkpoint.json")
            record["files"] = {n: h for n, h in hashes_of(out / "checkpoint-2").items() if n != "checkpoint.json"}
            write_sealed(out / "checkpoint-2/checkpoint.json", record)
        given = arguments(None, out, **options, latents_dir=run / "out/latents", resume_from_checkpoint="checkpoint-2")
        given = [*given, "--noise_key_file", str(run / "key")]
        code = train_here(given)
        assert code in (0, 2) and not marker.exists(), name
        errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert code == 0 or len(errors) == 1, name
        shutil.rmtree(out)


class nothing:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


def test_a_payload_in_any_file_of_a_store_is_not_run(build, emoji, miniature, tmp_path):
    from sdxl_ambient.latents import main

    marker = tmp_path / "executed"
    build(emoji, tmp_path / "s")
    for name in files_of(tmp_path / "s"):
        shutil.copytree(tmp_path / "s", tmp_path / "copy")
        (tmp_path / "copy" / name).write_bytes(pickle.dumps(Payload(marker)))
        with pytest.raises(UserError, match="is damaged"):
            LatentStore(tmp_path / "copy").verify()
        assert main(command(emoji, tmp_path / "copy", miniature)) in (0, 2)
        assert not marker.exists(), name
        shutil.rmtree(tmp_path / "copy")


def test_a_payload_in_any_file_of_an_adapter_is_not_run(run, miniature, tmp_path):
    from eval.generate import main

    marker, prompts = tmp_path / "executed", tmp_path / "prompts.txt"
    prompts.write_text("a penguin\n")
    adapter = run / "out"
    for name in ["pytorch_lora_weights.safetensors", "training.json", "adapter_config.json", "pytorch_lora_weights.bin"]:
        folder = tmp_path / "lora"
        folder.mkdir()
        for file in adapter.iterdir():
            if file.is_file() and file.name != ".lock":
                shutil.copy(file, folder)
        (folder / name).write_bytes(pickle.dumps(Payload(marker)))
        flags = {"pretrained_model_name_or_path": miniature, "lora": folder, "prompts_file": prompts,
                 "num_inference_steps": 1, "output_dir": tmp_path / "drawn", "sampler": "full", "num_images": 1,
                 "resolution": 64}  # fmt: skip
        try:
            code = main([word for k, v in flags.items() for word in (f"--{k}", str(v))])
        except SystemExit as exit:
            code = exit.code
        assert code in (0, 2) and not marker.exists(), name
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "drawn", ignore_errors=True)


def test_sharded_states_are_read_where_this_user_signed_them(run, tmp_path, monkeypatch):
    """FSDP's and DeepSpeed's are pickles: of somebody else's, --trust_checkpoint alone reads them."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(run / "out/checkpoint-2", folder)
    record = read_sealed(folder / "checkpoint.json")
    with pytest.raises(CheckpointError, match="was not written by you on this machine.*--trust_checkpoint"):
        check_trusted(folder, False)
    write_sealed(folder / "checkpoint.json", {**record, "signature": signature(record)})
    check_trusted(folder, False)
    (folder / "pytorch_model_fsdp_0").mkdir()
    (folder / "pytorch_model_fsdp_0/__0_0.distcp").write_bytes(b"planted")
    with pytest.raises(CheckpointError, match="has files that nobody signed"):
        check_trusted(folder, False)
    shutil.rmtree(folder / "pytorch_model_fsdp_0")
    changed = {**record, "step": 3}
    write_sealed(folder / "checkpoint.json", {**changed, "signature": signature(record)})
    with pytest.raises(CheckpointError, match="was not written by you"):
        check_trusted(folder, False)
    write_sealed(folder / "checkpoint.json", {**record, "signature": signature(record)})
    monkeypatch.setenv("SDXL_AMBIENT_HOME", str(tmp_path / "somebody else"))
    with pytest.raises(CheckpointError, match="was not written by you"):
        check_trusted(folder, False)
    check_trusted(folder, True)


RECORDS = ["{}", "[]", "", "{", '{"files": {}}', '{"files": 3, "format_version": 2}', "[" * 100_000,
           '{"step": 1, "progress": {}, "files": {}}']  # fmt: skip


@pytest.mark.parametrize("content", RECORDS)
def test_a_damaged_record_is_one_line_and_the_one_before_is_taken(run, tmp_path, content):
    out, said = tmp_path / "out", []
    shutil.copytree(run / "out", out, ignore=shutil.ignore_patterns("latents", "logs"))
    (out / "checkpoint-2/checkpoint.json").write_text(content)
    with pytest.raises(CheckpointError) as error:
        check_checkpoint(out / "checkpoint-2")
    assert "\n" not in str(error.value) and "checkpoint-2" in str(error.value)
    assert find_checkpoint(out, "latest", said.append) == out / "checkpoint-1" and len(said) == 1


def test_one_flipped_bit_in_any_file_falls_back_to_the_one_before(run, tmp_path):
    for name in files_of(run / "out/checkpoint-2"):
        out = tmp_path / "out"
        shutil.copytree(run / "out", out, ignore=shutil.ignore_patterns("latents", "logs"))
        data = bytearray((out / "checkpoint-2" / name).read_bytes())
        data[len(data) // 2] ^= 1
        (out / "checkpoint-2" / name).write_bytes(data)
        assert find_checkpoint(out, "latest", lambda line: None) == out / "checkpoint-1", name
        shutil.rmtree(out)
