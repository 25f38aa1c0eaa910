"""The campaign of faults finds nothing in a handful of encodings, and finds what is broken by hand."""

import json
import pickle
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.faults.__main__ import plan
from benchmarks.faults.campaign import DAMAGES, FAULTS, Result, _damage, _payload, summary
from benchmarks.faults.commands import all_commands
from benchmarks.faults.left import artefacts, differing, finished, noisy_latents
from tests.support.running import ROOT, process_env


def test_a_campaign_of_a_thousand_holds_every_fault_in_every_command():
    cases = plan(1100, seed=0)
    found = {(command, fault) for command, fault, _ in cases}
    assert {c for c, _ in found} == {c.name for c in all_commands()} and {f for _, f in found} == set(FAULTS)
    assert len(found) > 0.9 * len(all_commands()) * len(FAULTS) and cases == plan(1100, seed=0)
    assert len({seed for _, _, seed in cases}) == 1100


def test_the_planted_pickle_runs_when_it_is_loaded(tmp_path):
    pickle.loads(_payload(tmp_path / "executed"))
    assert (tmp_path / "executed").is_dir()


def test_a_second_draw_is_seen_even_in_a_hidden_file(tmp_path):
    (tmp_path / "out/latents").mkdir(parents=True)
    save_file({"a": torch.zeros(4, 8, 8), "b": torch.ones(4, 8, 8)}, tmp_path / "out/latents/latents-00000.safetensors")
    assert {name: len(seen) for name, seen in noisy_latents(tmp_path).items()} == {"a": 1, "b": 1}
    save_file({"a": torch.full((4, 8, 8), 0.5)}, tmp_path / "out/latents/.latents-00000.x.tmp.safetensors")
    assert {name: len(seen) for name, seen in noisy_latents(tmp_path).items()} == {"a": 2, "b": 1}


def test_one_flipped_bit_in_a_tensor_or_a_figure_is_a_difference(tmp_path):
    save_file({"w": torch.zeros(3)}, tmp_path / "w.safetensors")
    (tmp_path / "report.json").write_text('{"excess": 0.5, "seconds": 3}')
    before = artefacts(tmp_path)
    (tmp_path / "report.json").write_text('{"seconds": 9, "excess": 0.5}')
    assert differing(before, artefacts(tmp_path)) == []  # of the run, not of its result
    (tmp_path / "report.json").write_text('{"excess": 0.25, "seconds": 3}')
    save_file({"w": torch.tensor([0.0, 0.0, 1e-45])}, tmp_path / "w.safetensors")
    assert differing(before, artefacts(tmp_path)) == ["report.json", "w.safetensors"]


def test_finished_work_is_shards_images_and_checkpoints(tmp_path):
    for name in ("latents/latents-00000.safetensors", "images/0.png", "checkpoint-2/checkpoint.json", "other.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert sorted(finished(tmp_path)) == [
        "checkpoint-2/checkpoint.json",
        "images/0.png",
        "latents/latents-00000.safetensors",
    ]


@pytest.mark.parametrize("fault", DAMAGES)
def test_a_damage_changes_one_file(fault, tmp_path):
    (tmp_path / "out").mkdir()
    for k in range(3):
        (tmp_path / f"out/{k}").write_bytes(bytes(range(1, 200)))
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    _damage(fault, random.Random(0), tmp_path)
    assert sum(p.read_bytes() != before[p.name] for p in (tmp_path / "out").iterdir()) == 1


def test_the_summary_counts_what_was_injected_and_what_failed():
    results = [
        Result("encode", "SIGKILL in time", 1, ends=[-9, 0]),
        Result("encode", "bit flipped", 2, ends=[0, 2], message="error: damaged"),
        Result("embed", "small disk", 3, skipped="mount: not permitted"),
        Result("embed", "clock", 4, ends=[0, 0], problems={"silent_corruptions": "report.json"}),
    ]
    figures = summary(results)
    assert figures["faults_injected"] == 3 and figures["continued"] == 2 and figures["refused"] == {"bit flipped": 1}
    assert figures["silent_corruptions"] == 1 and figures["tracebacks"] == 0
    assert figures["failures"] == [{"command": "embed", "fault": "clock", "seed": 4, "silent_corruptions": "report.json"}]
    assert figures["skipped"] == {"small disk: mount: not permitted": 1}


HANDFUL = ("SIGKILL at a write", "pickle planted")


@pytest.mark.parametrize("faults", [HANDFUL, pytest.param(FAULTS, marks=pytest.mark.slow)], ids=["a handful", "all"])
def test_faults_in_encodings_leave_no_problem(tmp_path, faults):
    words = [sys.executable, "-m", "benchmarks.faults", "--json", str(tmp_path / "faults.json")]
    words += [f"--only=encode|{fault}|{seed}" for seed, fault in enumerate(faults)]
    done = subprocess.run(words, cwd=ROOT, env=process_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads((tmp_path / "faults.json").read_text())["figures"]
    assert figures["faults_injected"] == len(faults) and figures["failures"] == []
