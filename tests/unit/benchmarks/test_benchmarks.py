"""The benchmarks' records and README's table of them."""

import json

import pytest

from benchmarks.record import ROOT, met, target
from benchmarks.table import END, RESULTS, START, WHAT, rows, table, written


def test_readmes_table_is_that_of_the_committed_results():
    text = (ROOT / "README.md").read_text()
    assert written(text) == text, "run python -m benchmarks.table --write"


def test_every_record_says_what_it_was_and_its_targets_are_known():
    paths = sorted(RESULTS.glob("*.json"))
    assert paths
    for path in paths:
        record = json.loads(path.read_text())
        assert record.keys() == {"benchmark", "command", "environment", "seconds", "figures", "targets"}, path
        module = record["command"].removeprefix("python -m ").split(" ")[0]
        # study_again is benchmarks.study.again today.
        assert module.replace(".", "_") == f"benchmarks_{record['benchmark']}", path
        assert {"commit", "processor", "gpu", "threads", "versions"} <= record["environment"].keys(), path
        assert all(one["name"] in WHAT for one in record["targets"]), path


def test_a_missed_target_is_shown_as_missed(tmp_path):
    targets = [target("ambient_over_plain", 1.5, "<=", 1.03), target("naive_over_worst_ambient", 3.0, ">=", 2)]
    assert [met(one) for one in targets] == [False, True]
    record = {"environment": {"gpu": None}, "targets": targets}
    (tmp_path / "x.json").write_text(json.dumps(record))
    missed, kept = rows(tmp_path)
    assert "| 1.5 | ≤ 1.03 | **missed** | CPU, `x.json` |" in missed and "| 3 | ≥ 2 | met | CPU" in kept
    assert table(tmp_path).splitlines()[3:5] == [missed, kept]
    assert written(f"a\n{START}\nold\n{END}\nb", tmp_path) == f"a\n{table(tmp_path)}\nb"
    with pytest.raises(ValueError, match="once"):
        written("no marks", tmp_path)
