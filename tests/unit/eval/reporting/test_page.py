"""The page in a browser, and what it shows of the keys that schema 3 adds to report.json."""

import copy
import html
import json
import re
import shutil
import subprocess

import pytest
from support.pictures import REPOSITORY

from eval.memorization import main as evaluate
from eval.reporting import page as page_module_page
from eval.reporting.page import attack_rows, image_table, pair_groups, render, runs, strongest, with_additions
from eval.reporting.pictures import Shown, choose

DATA = REPOSITORY / "miniature" / "data"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(report, folder): two folders of real images as the base model and a copying one, with the keys of schema 3."""
    out = tmp_path_factory.mktemp("page")
    flags = ["--train_data_dir", str(DATA / "finetune"), "--heldout_data_dir", str(DATA / "heldout")]
    given = [f"copies={DATA / 'finetune'}", f"others={DATA / 'heldout'}"]
    assert evaluate(["--generated_dir", *given, *flags, "--output_dir", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    report["models"] = {"base": report["models"]["others"], "copies": report["models"]["copies"]}
    report["models"]["base"]["kind"] = "base"
    # Copies are all at 1: apart from each other, so that sorting has something to do.
    for i, row in enumerate(report["models"]["copies"]["samplers"]["given"]["images"]):
        row["similarity_to_train"] = round(1 - 0.001 * (37 * i % 100), 6)
    return schema_three(report), out


def schema_three(report):
    """The report with everything that schema 3 adds, made from its own figures where it can be."""
    report = copy.deepcopy(report)
    report["threshold"]["null"] = "heldout"
    base = report["models"]["base"]
    for name, model in report["models"].items():
        model.update(run=None, step=None)
        first = next(iter(model["samplers"]))
        extra = ("scale_0.5", "scale_1.5", "guidance_1") if name != "base" else ()
        for sampler in extra:
            model["samplers"][sampler] = copy.deepcopy(model["samplers"][first])
        model["own_sampler"], model["worst_sampler"] = first, (extra[1] if extra else first)
        for key, figures in model["samplers"].items():
            _add_to_sampler(figures, report, base["share_above_threshold"], key)
        _add_attacks(model)
        model["worst_case"] = _worst_case(model) if extra else None
    return report


def _difference(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def _add_to_sampler(figures, report, base, sampler):
    closest = max(figures["images"], key=lambda row: row["similarity_to_train"])
    figures["settings"] = {"sampler": "full", "t_n": None, "lora_scale": 1.0, "guidance_scale": 5.0, "mean_of": None}
    shares = (0.1, figures["share_above_threshold"])
    figures["seeds"] = [{"seed": i, "n": 9, "share_above_threshold": s, "median": 0.5} for i, s in enumerate(shares)]
    figures["difference_to_base"] = _difference(figures["share_above_threshold"] - base)
    figures["excess_interval"] = [0.05, 0.6]
    copied = {"file": closest["nearest_train"], "caption": "a thing", "nearest_of": 5, "above_threshold": 4}
    figures["most_copied"] = [{**copied, "highest": 0.99, "generated": closest["file"]}] * 14
    figures["clip_score"] = {"mean": 27.31, "n": 9, "model": "clip"}
    figures["score_normalized"] = {"k": 2, "quantiles": {}, "threshold": 0.2, "share_above_threshold": 0.123}
    for row in figures["images"]:
        row.update(p_value=round(1 - row["similarity_to_train"] ** 2, 4), score_normalized=row["similarity_to_train"] / 2)


def _add_attacks(model):
    attacks = {}
    for i, key in enumerate(f"{kind}/{t}" for kind in ("error", "one_step", "posterior") for t in (100, 700)):
        attacks[key] = {"n_train": 64, "n_heldout": 64, "mean_train": 0.1, "mean_heldout": 0.2, "tpr_at_1_fpr": 0.3}
        attacks[key] |= {"auc": 0.8 + i / 100, "auc_interval": [0.7, 0.9], "difference_to_base": _difference(0.31)}
        if key.startswith("error"):
            attacks[key] |= {"gap": -0.0123, "gap_standard_error": 0.0045}
    attacks["mask"] = {"auc": 0.61, "tpr_at_1_fpr": 0.0, "auc_interval": None, "difference_to_base": None}
    model["attacks"] = attacks


def _worst_case(model):
    rows = [
        {"name": name, "kind": "sampler", "value": s["share_above_threshold"], "low": 0.2, "high": 1.0, "control": 0.02}
        | {"copied": {"value": 0.9, "low": 0.8, "high": 1.0}, "difference_to_base": s["difference_to_base"], "above": True}
        for name, s in model["samplers"].items()
    ]
    attack = {"name": "error/700", "kind": "attack", "value": 0.81, "low": 0.6, "high": 0.9, "control": 0.5}
    rows.append({**attack, "copied": None, "difference_to_base": None, "above": True})
    return {"confidence": 0.95, "tests": 5, "confidence_each": 0.99, "worst": "scale_1.5", "rows": rows}


def without_heldout(report):
    """The same as it is where no held-out set is given and the base model's generations are the control."""
    report = copy.deepcopy(report)
    report["data"]["heldout"] = None
    report["controls"].update(heldout_to_train=None, fd_pixels=None, fd_embedding=None)
    report["threshold"].update(null="base", n_heldout=0)
    for model in report["models"].values():
        model["similarity_to_heldout"], model["attacks"] = None, None
        for figures in model["samplers"].values():
            for key in (
                "similarity_to_heldout",
                "share_above_threshold_heldout",
                "excess_over_heldout",
                "c_t",
                "kid",
                "prdc",
            ):
                figures[key] = None
            figures.update(fd_pixels=None, fd_embedding=None, mann_whitney_z=None, excess_interval=None)
            for row in figures["images"]:
                row["similarity_to_heldout"] = None
    return report


def text_of(page):
    return re.sub(
        r"\s+", " ", html.unescape(re.sub(r"<style>.*?</style>|<script>.*?</script>|<[^>]*>", " ", page, flags=re.S))
    )


def test_what_schema_three_adds_is_shown(made):
    text = text_of(render(*made))
    for said in (
        "Worst case",
        "simultaneous intervals (Bonferroni)",
        "99.00 %",
        "All samplers",
        "Training images that are copied most",
    ):
        assert said in text
    for said in (
        "4 above the threshold , nearest of 5",
        "12 of the 14",
        "27.31",
        "12.3%",
        "0.700 to 0.900",
        "−0.0123 ± 0.0045",
    ):
        assert said in text
    assert "worst of 4, scale_1.5" in text and "All 14 attacks" in text


def test_a_page_from_schema_two_needs_none_of_it(made):
    report, out = copy.deepcopy(made[0]), made[1]
    del report["threshold"]["null"]
    for model in report["models"].values():
        for key in ("run", "step", "worst_case", "own_sampler"):
            del model[key]
        for figures in model["samplers"].values():
            for key in ("seeds", "difference_to_base", "excess_interval", "most_copied", "clip_score", "score_normalized"):
                del figures[key]
            for row in figures["images"]:
                del row["p_value"], row["score_normalized"]
        for attack in model["attacks"].values():
            for key in ("auc_interval", "difference_to_base"):
                del attack[key]
    text = text_of(render(report, out))
    assert "Worst case" not in text and "p-value" not in text.replace("Conformal p-value", "")


def test_without_a_heldout_set_the_page_says_what_that_means(made):
    page = render(without_heldout(made[0]), made[1])
    text = text_of(page)
    assert "nearer to its training set for style alone" in text and "overstate copying" in text
    assert "held-out →" not in page and "held-out images (H)" not in text and "Similarity to H" not in text


def test_checkpoints_of_a_run_stand_in_the_order_of_their_steps(made):
    report = copy.deepcopy(made[0])
    for step in (200, 100):
        report["models"][f"at_{step}"] = {**copy.deepcopy(report["models"]["copies"]), "run": "first", "step": step}
    report["models"]["alone"] = {**copy.deepcopy(report["models"]["copies"]), "run": "second", "step": 100}
    (run,) = runs(with_additions(report))
    assert [p["name"] for p in run["points"]] == ["at_100", "at_200"] and run["svg"].startswith("data:image/svg")
    assert "Checkpoints of a training run" in text_of(render(report, made[1]))


def test_attacks_without_a_timestep_and_the_strongest_of_each_model(made):
    rows = attack_rows(made[0])
    assert [(r["model"], r["t"]) for r in rows if r["attack"] == "mask"] == [("base", ""), ("copies", "")]
    assert [(r["model"], r["attack"], r["t"]) for r in strongest(rows)] == [
        ("base", "posterior", "700"),
        ("copies", "posterior", "700"),
    ]


def test_pairs_at_the_threshold_are_some_of_those_nearest_to_it(made):
    report, _ = made
    figures, threshold = report["models"]["base"]["samplers"]["given"], report["threshold"]["value"]
    top, at, some = pair_groups(figures, report, Shown(report, "", choose("all", None)))
    assert at["title"] == "At the threshold" and len(at["rows"]) == page_module_page.THRESHOLD_PAIRS
    shown = {row["file"] for row in top["rows"]}
    away = sorted(abs(r["similarity_to_train"] - threshold) for r in figures["images"] if r["file"] not in shown)
    assert all(abs(r["similarity_to_train"] - threshold) <= away[page_module_page.NEAR_THRESHOLD - 1] for r in at["rows"])
    assert not {r["file"] for r in at["rows"]} & ({r["file"] for r in some["rows"]} | shown)


def test_a_large_table_is_cut_and_says_so(made, monkeypatch):
    monkeypatch.setattr("eval.reporting.page.MOST_ROWS", 7)
    figures = made[0]["models"]["copies"]["samplers"]["given"]
    table = image_table(figures, made[0], Shown(*made, choose("all", None)))
    shown = [row["similarity_to_train"] for row in table["rows"]]
    assert shown == sorted((r["similarity_to_train"] for r in figures["images"]), reverse=True)[:7]
    assert f"The 7 closest of {len(figures['images'])} images; all are in report.json." in text_of(render(*made))


def test_long_lists_of_what_was_left_out_are_cut(made):
    report = copy.deepcopy(made[0])
    report["data"]["train"]["excluded"] = [{"file": f"{i}.png", "reason": "unreadable"} for i in range(350)]
    text = text_of(render(report, made[1]))
    assert "training set: 350 images" in text and "The first 200 of 350" in text
    assert "199.png" in text and "200.png:" not in text


# -- in a browser --------------------------------------------------------------------

# Drives the page as a person would, then leaves what it found in the title, which --dump-dom prints.
DRIVER = """
const found = {}, errors = [];
addEventListener("error", (event) => errors.push(String(event.message)));
addEventListener("load", () => {
  const block = document.querySelector(".images[open]"), table = block.querySelector("table");
  const column = (n) => [...table.tBodies[0].rows].map((row) => row.cells[n].dataset.v ?? row.cells[n].textContent.trim());
  const sorted = () => [...table.querySelectorAll("[aria-sort]")].map((th) => [th.cellIndex, th.getAttribute("aria-sort")]);
  const press = (n) => {
    const button = table.tHead.rows[0].cells[n].querySelector("button");
    button.focus();
    if (document.activeElement !== button || button.tabIndex < 0) errors.push("button can't be focused");
    button.click();
    if (document.activeElement !== button) errors.push("focus was lost");
  };
  found.titles = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
  const similarity = found.titles.indexOf("Similarity to T"), file = 0;
  found.steps = [];
  for (const n of [null, similarity, similarity, file, file, found.titles.indexOf("p-value")]) {
    if (n !== null) press(n);
    found.steps.push({ sorted: sorted(), values: column(sorted()[0][0]) });
  }
  const input = block.querySelector("input");
  found.label = input.labels[0].textContent;
  input.value = "1f1 PNG";
  input.dispatchEvent(new Event("input"));
  found.kept = [...table.tBodies[0].rows].filter((row) => row.offsetHeight > 0).map((row) => row.textContent);
  found.status = block.querySelector("[role=status]").textContent;
  for (const details of document.querySelectorAll("details")) details.open = true;
  // Headless Chromium makes no window below 500 px: a frame of 400 px shows the page as a telephone does.
  const frame = document.createElement("iframe");
  frame.style.width = "400px";
  frame.style.height = "800px";
  frame.srcdoc = document.documentElement.outerHTML.replace(/<script>[^]*?<\\/script>/g, "");
  frame.onload = () => {
    const inner = frame.contentDocument.documentElement;
    found.narrow = [inner.clientWidth, inner.scrollWidth];
    found.errors = errors;
    document.title = JSON.stringify(found);
  };
  document.body.append(frame);
});
"""


def dump(page, folder):
    """The page's DOM after its scripts have run, and what the browser logged."""
    if BROWSER is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    quiet += ["--disable-component-update", "--disable-dev-shm-usage", "--enable-logging=stderr", "--no-sandbox"]
    profile = [f"--user-data-dir={folder / 'profile'}", "--window-size=1280,900", "--virtual-time-budget=5000"]
    command = [BROWSER, "--headless", *quiet, *profile, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_the_script_runs_under_the_page_s_own_policy(made, tmp_path):
    page = render(*made)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page).group(1)
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    dom, logged = dump(page, tmp_path)
    assert re.search(r'<html lang="en" class="js"', dom) and not logged


def test_tables_of_images_sort_and_filter_and_nothing_overflows_a_telephone(made, tmp_path):
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", render(*made))
    dom, logged = dump(page.replace("<script>", f"<script>{DRIVER}</script><script>", 1), tmp_path)
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", dom, re.S).group(1)))
    assert found["errors"] == [] and logged == []
    names, steps = found["titles"], found["steps"]
    similarity, p_value = names.index("Similarity to T"), names.index("p-value")
    assert [s["sorted"] for s in steps] == [
        [[similarity, "descending"]],
        [[similarity, "ascending"]],
        [[similarity, "descending"]],
        [[0, "ascending"]],
        [[0, "descending"]],
        [[p_value, "ascending"]],
    ]
    numbers = [[float(v) for v in s["values"]] for s in (steps[0], steps[1], steps[5])]
    assert numbers[0] == sorted(numbers[0], reverse=True) and numbers[1] == sorted(numbers[1]) != numbers[0]
    assert numbers[2] == sorted(numbers[2])
    assert steps[3]["values"] == steps[4]["values"][::-1] and len(set(steps[3]["values"])) == len(numbers[0])
    assert 0 < len(found["kept"]) < len(numbers[0])
    assert all("1f1" in row.lower() and "png" in row.lower() for row in found["kept"])
    assert found["status"].startswith(f"{len(found['kept'])} of {len(numbers[0])} rows") and found["label"]
    assert found["narrow"][1] <= found["narrow"][0] <= 400
