"""What the page embeds: ``--pictures``. No real picture under ``generated``, and no picture or name under ``none``."""

import base64
import copy
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from support.pictures import copy_emoji

from eval.images import data_uri
from eval.memorization import main as evaluate
from eval.report import main as report_again
from eval.reporting.cautions import cautions
from eval.reporting.page import render, verdict_text
from eval.reporting.pictures import LARGE, SMALL, Shown, choose
from sdxl_ambient.provenance import hash_file

RASTER = re.compile(r"data:image/(?!svg)[a-z]+;base64,[A-Za-z0-9+/=]+")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(report, folder): 12 drawn pictures beside files, pixels and near-duplicates of training and held-out pictures."""
    root = tmp_path_factory.mktemp("pictures")
    train, heldout = (copy_emoji(root / name, 70, name) for name in ("finetune", "heldout"))
    generated = root / "generated"
    generated.mkdir()
    for source, prefix in ((train, "t"), (heldout, "h")):
        for i, path in enumerate(sorted(source.glob("*.png"))[:4]):
            shutil.copy(path, generated / f"{prefix}{i}.png")
        for i, path in enumerate(sorted(source.glob("*.png"))[4:8]):
            white = Image.new("RGBA", (64, 64), "white")
            Image.alpha_composite(white, Image.open(path).convert("RGBA")).convert("RGB").save(
                generated / f"{prefix}_{i}.png"
            )
    rng = np.random.default_rng(0)
    for i in range(12):
        coarse = Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8))
        coarse.resize((64, 64), Image.Resampling.BICUBIC).save(generated / f"own_{i}.png")
    flags = ["--generated_dir", f"model={generated}", "--train_data_dir", str(train), "--heldout_data_dir", str(heldout)]
    assert evaluate([*flags, "--output_dir", str(root / "out")]) == 0
    return json.loads((root / "out" / "report.json").read_text()), root, flags


def page(made, pictures, budget=None):
    return render(made[0], made[1] / "out", choose(pictures, budget))


def real_pictures(root):
    files = [p for name in ("finetune", "heldout") for p in sorted((root / name).glob("*.png"))]
    return {data_uri(p, size): p.name for p in files for size in (LARGE, SMALL, 144)}


def pixels(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB").tobytes()


def test_all_embeds_both_kinds(made):
    uris = set(RASTER.findall(page(made, "all")))
    assert len(uris & real_pictures(made[1]).keys()) > 8
    assert any(data_uri(made[1] / "generated" / f"own_{i}.png", LARGE) in uris for i in range(12))


def test_generated_holds_no_pixel_of_a_training_or_held_out_picture(made):
    """Neither as the nearest picture nor as a generated one that is a real one by bytes, pixels or fingerprint."""
    text = page(made, "generated")
    uris, real = set(RASTER.findall(text)), real_pictures(made[1])
    assert uris and not uris & real.keys()
    assert not {pixels(uri) for uri in uris} & {pixels(uri) for uri in real}
    own = {data_uri(made[1] / "generated" / f"own_{i}.png", size) for i in range(12) for size in (LARGE, SMALL)}
    assert uris <= own
    assert "(not shown)" in text and "held back: it is a training or held-out picture, or nearly" in text
    assert "Pictures on the page: generated ones alone (--pictures generated)." in text


def test_none_holds_no_picture_name_or_caption(made):
    report, root, _ = made
    text = page(made, "none")
    assert not RASTER.search(text) and "data:image/svg+xml" in text
    rows = report["models"]["model"]["samplers"]["given"]["images"]
    names = {row[key] for row in rows for key in ("file", "nearest_train", "prompt", "nearest_train_caption")} - {None}
    assert len(names) > 30 and not [name for name in names if name in text]
    assert str(root / "finetune") not in text and str(root / "heldout") not in text
    nearest = max(rows, key=lambda row: row["similarity_to_train"])["nearest_train"]
    assert f"SHA-256 {hash_file(root / 'finetune' / nearest)[:16]}" in text
    assert "frames of one burst" not in text or "such as" not in text


def test_none_is_the_default_with_a_budget_and_the_last_lines_say_so(made, capsys):
    report, root, flags = made
    out = root / "budget"
    evaluate([*flags, "--output_dir", str(out), "--max_excess", "0.9"])
    *_, chosen, last = capsys.readouterr().out.splitlines()
    assert last == str(out / "index.html") and chosen.startswith("Pictures on the page: none, hashes instead")
    assert "--max_excess" in chosen
    assert not RASTER.search((out / "index.html").read_text()) and chosen.split(" (")[0] in (out / "index.html").read_text()
    assert report_again([str(out)]) == 0 and not RASTER.search((out / "index.html").read_text())
    assert report_again([str(out), "--pictures", "all"]) == 0 and RASTER.search((out / "index.html").read_text())
    assert "generated and training ones (--pictures all)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        report_again([str(out), "--pictures", "some"])
    line = capsys.readouterr().err.strip()
    assert "--pictures: 'some' is not one of auto, all, generated, none" in line and "\n" not in line


def test_what_auto_stands_for():
    assert [choose("auto", budget).shown for budget in (None, 0.0, 0.1)] == ["all", "none", "none"]
    assert choose("all", 0.1).shown == "all" and choose("none", None).shown == "none"


def test_the_number_of_pictures_is_bounded_and_what_was_left_out_is_counted(made, monkeypatch):
    monkeypatch.setattr("eval.reporting.pictures.MOST_PICTURES", 5)
    text = page(made, "all")
    assert len(RASTER.findall(text)) == 5 and "(left out: the page is full)" in text
    count = text.count("(left out: the page is full)")
    assert f"5 are embedded, of at most 1200; {count} more were left out" in text


def test_base_and_tuned_pictures_of_one_prompt_and_seed_stand_beside_each_other(made):
    report, root, _ = made
    drawn = copy.deepcopy(report)
    tuned = drawn["models"].pop("model")
    tuned["kind"] = "lora"
    base = {**copy.deepcopy(tuned), "kind": "base"}
    drawn["models"] = {"base": base, "tuned": tuned}
    beside = "The base model&#39;s image of the same prompt and seed"
    assert render(drawn, root / "out", choose("all", None)).count(beside) == 18
    base["samplers"]["given"]["n_generated"] += 1  # then files of one name are of other prompts or seeds
    assert beside not in render(drawn, root / "out", choose("all", None))


def test_another_source_and_few_held_out_images_are_warned_of(made):
    report = copy.deepcopy(made[0])
    threshold = report["threshold"]
    assert threshold["n_heldout_needed"] == 49 and threshold["source_p_value"] > 0.01
    (few,) = cautions(report)
    assert few.startswith(f"Only {threshold['n_null']} held-out images") and "below 98" in few
    threshold.update(n_null=98, source_p_value=0.003)
    (source,) = cautions(report)
    assert "another source" in source and "p = 0.003" in source and source in render(report, made[1] / "out")
    threshold["source_p_value"] = 0.01
    assert cautions(report) == []


def test_the_page_has_a_dark_and_a_printed_look_and_enlarges_without_a_library(made):
    text = page(made, "all")
    style, script = (re.search(rf"<{tag}>(.*?)</{tag}>", text, re.S)[1] for tag in ("style", "script"))
    dark = re.search(r"@media screen and \(prefers-color-scheme: dark\) \{\s*:root \{(.*?)\}", style, re.S)[1]
    light = re.search(r":root \{(.*?)\}", style, re.S)[1]
    variables = [set(re.findall(r"(--\w+):", one)) for one in (light, dark)]
    assert variables[0] == variables[1] >= set(re.findall(r"var\((--\w+)\)", style))
    assert "@page" in style and "details-content" in style and "table-header-group" in style
    for word in (
        "showModal",
        "beforeprint",
        "afterprint",
        'setAttribute("aria-label", "Enlarged picture")',
        "Close (Escape)",
    ):
        assert word in script


def test_a_verdict_without_names_says_the_rest(made):
    report = copy.deepcopy(made[0])
    model = report["models"]["model"]
    first = model["samplers"]["given"]["contained"]["copies"][0]
    held = "2 of 70 held-out images are as near to a training image as known copies are"
    model["verdict"]["text"] = f"{first['file']} is {first['train']}. {held} (such as my (1).png): frames of one burst?."
    shown = Shown(report, made[1] / "out", choose("none", None))
    digests = [hash_file(made[1] / f) for f in (f"generated/{first['file']}", f"finetune/{first['train']}")]
    wanted = " is ".join(f"SHA-256 {digest[:16]}…" for digest in digests)
    assert verdict_text(model, shown) == f"{wanted}. {held}: frames of one burst?."
    assert verdict_text(model, Shown(report, made[1] / "out", choose("all", None))) == model["verdict"]["text"]
