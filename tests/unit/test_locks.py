"""One writer per folder."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support.stores import environment

from sdxl_ambient.errors import LockedError
from sdxl_ambient.locks import LOCK, OWNER, is_empty, locked
from sdxl_ambient.provenance import atomic, write_json

HOLD = """
import sys, time
from sdxl_ambient.locks import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_ends_in_one_line_with_host_process_and_since_when(tmp_path):
    process = holder(tmp_path / "out")
    with pytest.raises(
        LockedError, match=rf"out is being written by process {process.pid} on \S+ since 20\d\d-.*; wait"
    ) as e:
        with locked(tmp_path / "out"):
            pass
    assert "\n" not in str(e.value)
    process.kill(), process.wait()


def test_a_dead_owners_lock_is_taken_over_and_said(tmp_path):
    process, said = holder(tmp_path / "out"), []
    process.send_signal(signal.SIGKILL)
    process.wait()
    with locked(tmp_path / "out", said.append):
        who = json.loads((tmp_path / "out" / OWNER).read_text())
        assert who["process"] == os.getpid()
    assert len(said) == 1 and f"process {process.pid}" in said[0] and "ended without a word" in said[0]
    with locked(tmp_path / "out", said.append):
        assert len(said) == 1


def test_a_folder_in_which_nothing_was_made_goes(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / "out"):
        raise RuntimeError
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"):
        (tmp_path / "out" / "result").write_text("")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"result", LOCK}


def test_what_a_write_that_was_cut_off_leaves_is_nothing(tmp_path):
    """A run killed at its first write can be run again."""
    names = []
    for name in ("manifest.json", "latents-00000.safetensors", "note"):
        with atomic(tmp_path / "elsewhere" / name) as temporary:
            names.append(temporary.name)
            temporary.touch()
    out = tmp_path / "out"
    assert is_empty(out)
    write_json(out / OWNER, {})
    for name in (LOCK, *names, ".checkpoint-2.tmp", ".unet.tmp"):
        (out / name).touch()
    assert is_empty(out)
    for name in (".hidden", "a.tmp", "result.json"):
        (out / name).touch()
        assert not is_empty(out), name
        (out / name).unlink()


def test_a_damaged_note_of_the_owner_is_no_traceback(tmp_path):
    process = holder(tmp_path / "out")
    (tmp_path / "out" / OWNER).write_text("[" * 100000)
    with pytest.raises(LockedError, match="another run, which didn't say who it is"):
        with locked(tmp_path / "out"):
            pass
    process.kill(), process.wait()


def test_two_encodings_into_one_store_are_one(emoji, miniature, tmp_path):
    """One goes on, the other says why it doesn't; the store is as one run makes it."""
    from support.stores import command, equal, latents_in

    argv = [sys.executable, "-m", "sdxl_ambient.latents", *command(emoji, tmp_path / "s", miniature, "--shard_size", "1")]
    running = [subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in running]
    codes = sorted(process.returncode for process in running)
    assert codes in ([0, 2], [0, 0])  # both, where one began after the other's end
    if codes == [0, 2]:
        assert sum("is being written by process" in error.splitlines()[-1] for error in errors if error) == 1
    one = [*argv[:3], *command(emoji, tmp_path / "alone", miniature)]
    assert subprocess.run(one, env=environment(), capture_output=True, timeout=300).returncode == 0
    assert equal(latents_in(tmp_path / "s"), latents_in(tmp_path / "alone"))


def test_time_does_not_matter(tmp_path, monkeypatch):
    """A clock that jumps frees nothing and locks nothing."""
    process = holder(tmp_path / "out")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with pytest.raises(LockedError), locked(tmp_path / "out"):
        pass
    process.kill(), process.wait()
