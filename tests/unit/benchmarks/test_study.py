"""The study: its grid, its pictures, its intervals and the sentences that it draws from them."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from benchmarks.miniature.data import read_emoji
from benchmarks.record import ROOT
from benchmarks.study import __main__ as study
from benchmarks.study import data as study_data
from benchmarks.study.again import compare, totals
from benchmarks.study.cell import Folders, flags, samplers
from benchmarks.study.cells import CELLS, RECORD, read_cells
from benchmarks.study.claims import claims
from benchmarks.study.grid import FULL, GRIDS, METHODS, MORE_SEEDS, REDUCED, SEEDS, Cell
from benchmarks.study.intervals import excess_over_seeds, judged, over_seeds
from benchmarks.study.markdown import markdown
from benchmarks.study.pages import PAGES, pages, paper_tables, put
from benchmarks.study.rows import best_trade, require, rows
from eval.statistics.calibrate import Estimate, share_difference
from sdxl_ambient.config.parser import parse_options
from sdxl_ambient.config.training import TrainOptions
from sdxl_ambient.errors import ImagesMissing

# -- grid ------------------------------------------------------------------------------


def test_the_grids_hold_every_seed_and_each_cell_once():
    assert set(REDUCED) < set(FULL) and len(set(FULL)) == len(FULL) and FULL[: len(REDUCED)] == REDUCED
    noisy = sum(m.noisy for m in METHODS.values())
    assert len(FULL) == 3 * len(SEEDS) * (4 * noisy + len(METHODS) - noisy) + len(MORE_SEEDS)
    for cell in FULL:
        assert {c.seed for c in FULL if (c.method, c.t_n, c.size) == (cell.method, cell.t_n, cell.size)} >= set(SEEDS)
    assert len({cell.name for cell in FULL}) == len(FULL)


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.trainer == "script"])
def test_the_trainer_accepts_every_method(method, tmp_path):
    folders = Folders(tmp_path / "data", tmp_path / "work", tmp_path / "cells")
    for name in ("train_32", "heldout", "tuning"):
        (folders.data / name).mkdir(parents=True)
    cell = next(c for c in FULL if c.method == method and c.size == 32)
    options = parse_options(TrainOptions, flags(cell, folders, tmp_path / "run"), prog="study", description="")
    assert options.t_n == cell.t_n and options.seed == cell.seed
    assert all(steps % options.checkpointing_steps == 0 for steps in cell.lengths)
    assert options.checkpoints_total_limit > len(cell.lengths)
    assert bool(options.early_stopping) == cell.recipe.tuned == ("tuning" in str(options.heldout_data_dir))


@pytest.mark.parametrize("method", METHODS)
def test_every_picture_is_passed_as_often_at_every_size(method):
    small, large = (next(c for c in FULL if c.method == method and c.size == size) for size in (32, 512))
    if METHODS[method].trainer != "none":
        assert large.flags["max_train_steps"] == 16 * small.flags["max_train_steps"] == large.lengths[-1]
    assert {**large.flags, "max_train_steps": 0} == {**small.flags, "max_train_steps": 0}
    assert large.lengths == tuple(16 * n for n in small.lengths)


def test_the_base_model_is_not_sampled_with_an_adapter(tmp_path):
    assert {s.mode for s in samplers(None, 500)} == {"full"}
    assert {s.mode for s in samplers(tmp_path, 500)} == {"full", "early_stop", "hybrid"}


# -- pictures --------------------------------------------------------------------------


def test_pictures_near_what_the_base_model_knows_stay_out(monkeypatch):
    known = read_emoji(ROOT / "miniature/data/pretrain")[:40]
    fresh = read_emoji(ROOT / "miniature/data/finetune")[:60]
    found = study_data.unrelated([*fresh, known[3]], known)
    names = [e.file_name for e in found]
    assert known[3].file_name not in names and 30 < len(names) <= 60
    similarity = study_data.features(found) @ study_data.features(known).T
    assert similarity.max() < study_data.NEAR
    assert names == [e.file_name for e in study_data.unrelated([known[3], *fresh[::-1]], known)]
    # The miniature's own split goes by another hash: its parts are mixed here.
    assert names != sorted(names)


def test_the_sets_are_nested_and_share_nothing_with_the_held_out_one(monkeypatch, tmp_path):
    some = read_emoji(ROOT / "miniature/data/heldout")[:24]
    monkeypatch.setattr(study_data, "TUNING", 3)
    monkeypatch.setattr(study_data, "SIZES", (4, 8))
    monkeypatch.setattr(study_data, "HELDOUT", 6)
    monkeypatch.setattr(study_data, "read_archive", lambda archive, vendor: some)
    monkeypatch.setattr(study_data, "unrelated", lambda emoji, known: emoji)
    assert study_data.write_sets(tmp_path / "a.tgz", ROOT / "miniature/data/finetune", tmp_path / "sets") == {
        "train_4": 4,
        "train_8": 8,
        "heldout": 6,
        "tuning": 3,
    }
    four, eight, heldout, tuning = (
        {e.file_name for e in read_emoji(tmp_path / "sets" / name)} for name in ("train_4", "train_8", "heldout", "tuning")
    )
    assert four < eight and not (eight & heldout or eight & tuning or heldout & tuning)
    assert Image.open(tmp_path / "sets/heldout" / next(iter(heldout))).size == (64, 64)
    monkeypatch.setattr(study_data, "HELDOUT", 17)
    with pytest.raises(ImagesMissing, match="24 pictures can be used, 28 are needed"):
        study_data.write_sets(tmp_path / "a.tgz", ROOT / "miniature/data/finetune", tmp_path / "sets")


# -- intervals -------------------------------------------------------------------------


def test_the_interval_over_seeds_is_students():
    found = over_seeds([0.1, 0.3, 0.2])
    assert found.value == pytest.approx(0.2)
    assert found.high - found.value == pytest.approx(4.302652729911275 * 0.1 / math.sqrt(3))
    alone = over_seeds([0.4])
    assert (alone.value, alone.low, alone.high) == (0.4, -math.inf, math.inf)


def test_it_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(0.3, 0.1, (4000, 3))
    covered = np.mean([e.low <= 0.3 <= e.high for e in map(over_seeds, draws)])
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def of_seed(share, excess, n=100, fd=2.0):
    prdc = dict.fromkeys(("precision", "recall", "density", "coverage"), 0.5)
    return {
        "n_generated": n,
        "share_above_threshold": share,
        "excess_over_heldout": excess,
        "fd_pixels": fd,
        "authpct": 0.6,
        "prdc": prdc,
    }


def test_an_excess_of_nothing_in_every_seed_has_a_width_all_the_same():
    found = excess_over_seeds([of_seed(0.0, 0.0)] * 3)
    pooled = share_difference(0, 300, 0, 300)
    assert found == Estimate(0.0, pooled.low, pooled.high) and found.high > 0.01


def test_seeds_that_scatter_more_than_samples_widen_it():
    found = excess_over_seeds([of_seed(s, s) for s in (0.0, 0.3, 0.6)])
    assert (found.low, found.high) == (over_seeds([0.0, 0.3, 0.6]).low, over_seeds([0.0, 0.3, 0.6]).high)


# -- sentences -------------------------------------------------------------------------


def cell(method, seed, excess, fd, t_n=None, steps=300, samplers=("full",)):
    found = {s: of_seed(excess[i], excess[i], fd=fd) for i, s in enumerate(samplers)}
    attacks = {}
    for t in (100, 500, 800, 900):
        attacks[f"error/{t}"] = {"auc": 0.5, "mean_heldout": 0.1, "mean_train": 0.1}
        attacks[f"one_step/{t}"] = {"auc": 0.6, "mean_heldout": 0.4, "mean_train": 0.4 + excess[0]}
    worst = max(found, key=lambda s: found[s]["excess_over_heldout"])
    return {
        "cell": {"method": method, "t_n": t_n, "size": 128, "seed": seed},
        "cost": {"cpu_seconds": 10.0},
        "lengths": {str(steps): {"samplers": found, "worst": worst, "attacks": attacks}},
    }


@pytest.fixture
def table():
    made = []
    for seed, wobble in enumerate((-0.01, 0.0, 0.01)):
        made += [
            cell("clean", seed, (0.5 + wobble, 0.2), 2.0, samplers=("full", "hybrid")),
            cell("skip", seed, (0.4 + wobble, 0.1), 3.0, t_n=500, samplers=("early_stop", "hybrid")),
            cell("restore_base", seed, (0.02 + wobble / 2,), 1.9 + wobble, t_n=800),
            cell("clean_low", seed, (0.0,), 1.0, t_n=500),
        ]
    return rows(made)


def test_a_models_excess_is_that_of_its_worst_sampler(table):
    hybrid = require(table, "clean", 128, sampler="hybrid")
    assert hybrid["excess"]["value"] == pytest.approx(0.2)
    assert hybrid["worst_excess"]["value"] == pytest.approx(0.5) and hybrid["worst_samplers"] == ["full"] * 3


def test_the_best_trade_never_saw_clean_latents_and_keeps_the_quality(table):
    best = best_trade(table, 128)
    assert best is not None and best["method"] == "restore_base"


def test_claims_are_judged_by_the_paired_interval(table):
    found = {c["claim"]: c for c in claims(table)}
    (cut,) = [c for name, c in found.items() if "by at least 80 % (worst" in name]
    assert cut["verdict"] == "confirmed" and cut["figure"] == "cut by 96%"
    # 0.02 + w/2 − 0.2 (0.5 + w) in each seed
    assert cut["contrast"]["value"] == pytest.approx(-0.08)
    assert judged(Estimate(-1, -2, -0.1)) == "confirmed"
    assert judged(Estimate(1, 0.1, 2)) == "not confirmed"
    assert judged(Estimate(-1, -2, 0.1)) == "not decidable at this size"


def test_a_single_seed_decides_nothing():
    table = rows([cell("clean", 0, (0.5,), 2.0, samplers=("full",)) | {}, cell("restore_base", 0, (0.0,), 1.9, t_n=800)][1:])
    assert claims(table) == []
    both = [cell("clean", 0, (0.5, 0.2), 2.0, samplers=("full", "hybrid")), cell("restore_base", 0, (0.0,), 1.9, t_n=800)]
    verdicts = {c["verdict"] for c in claims(rows(both)) if c["contrast"]}
    assert verdicts == {"not decidable at this size"}
    assert json.loads(json.dumps(rows(both), allow_nan=False))


def test_a_method_works_only_if_both_copying_and_quality_say_so(table):
    found = {c["claim"]: c for c in claims(table) if "at most 10 % above plain's" in c["claim"]}
    verdicts = {name.split(", t_n")[0].split(": ")[1]: c["verdict"] for name, c in found.items()}
    assert verdicts == {
        "ambient, nothing below t_n": "not confirmed",
        "restored by the base model, every level": "confirmed",
    }
    assert sorted(c["figure"] for c in found.values())[0] == "cut by 20%, FD × 1.50"


def test_weights_that_held_out_pictures_chose_say_of_which_step_they_are():
    made = [cell("skip_early", seed, (0.1, 0.1), 2.0, t_n=500, samplers=("hybrid", "early_stop")) for seed in (0, 1)]
    for one, step in zip(made, (30, 60), strict=True):
        one["cost"]["kept_step"] = step
    assert "| 45 of 300 |" in markdown(rows(made)) and "| 300 |" in markdown(
        rows([cell("clean", 0, (0.5, 0.2), 2.0, samplers=("full", "hybrid"))])
    )


# -- a second run ------------------------------------------------------------------------


def test_a_second_run_is_compared_over_the_seeds_that_both_have():
    first = [cell("restore_base", s, (0.1 + w,), 2.0 + w, t_n=800) for s, w in enumerate((-0.01, 0.0, 0.01, 5.0))]
    again = [cell("restore_base", s, (0.1 - w,), 3.0 + w, t_n=800) for s, w in enumerate((-0.01, 0.0, 0.01))]
    (row,) = compare(first, again)
    assert row["seeds"] == [0, 1, 2] and row["excess"]["agrees"] and not row["excess"]["identical"]
    assert row["auc"]["identical"] and row["auc"]["agrees"]
    assert not row["fd"]["agrees"] and row["fd"]["difference"]["value"] == pytest.approx(1.0)
    # Welch with equal variances and sizes has 2 (n − 1) degrees of freedom.
    half = 2.7764451051977987 * 0.01 * math.sqrt(2 / 3)
    assert row["fd"]["difference"]["high"] - 1.0 == pytest.approx(half)
    found = totals([row, {**row, "sampler": "other"}])
    assert (found["figures"], found["identical"], found["others"], found["others_agree"]) == (4, 1, 3, 1)
    assert compare(first, again[:1]) == []


# -- pages -----------------------------------------------------------------------------


def test_text_is_put_between_its_marks_only():
    marked = "a\n<!-- x: python -m benchmarks.study --summarise -->\nold\n<!-- /x -->\nb"
    assert put(put(marked, "x", "new"), "x", "new") == marked.replace("old", "new")
    with pytest.raises(ValueError, match="once"):
        put("a", "x", "new")


def test_the_pages_are_those_of_the_committed_cells():
    record = json.loads(RECORD.read_text())
    cells = read_cells(CELLS)
    assert record["figures"]["cells"] == len(cells)
    assert json.loads(json.dumps(rows(cells))) == record["figures"]["rows"]
    texts = [(ROOT / name).read_text() for name in PAGES]
    assert pages(record, texts) == texts, "run python -m benchmarks.study --summarise"


def test_the_papers_table_says_what_was_not_run(table):
    text = paper_tables(table, 128)
    assert "| paper, no consistency: FID | 9.93 | 14.95 | 19.82 | 29.19 |" in text
    assert "| ours, no consistency: FD | 2.00 (2.00 to 2.00) | not run | 3.00 (3.00 to 3.00) | not run |" in text
    assert "| ours, with consistency: FD |  | not run | not run | not run |" in text


def test_reduced_is_the_default_and_a_missing_archive_is_named(capsys):
    assert study.parse_args(["--summarise"]).grid == "reduced" and "reduced" in GRIDS
    with pytest.raises(SystemExit):
        study.parse_args(["--archive", "nowhere.tgz"])
    assert "--archive: 'nowhere.tgz' is not a file" in capsys.readouterr().err


def test_a_cells_name_tells_what_it_is():
    assert Cell("skip", 500, 128, 2).name == "skip-t500-n128-s2" and Cell("clean", None, 32, 0).name == "clean-n32-s0"
