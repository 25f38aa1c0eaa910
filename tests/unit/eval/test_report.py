"""The page: self-contained, in order, made from report.json alone, and escaped."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from support.pictures import REPOSITORY

from eval.memorization import main as evaluate
from eval.report import main
from eval.reporting.page import pair_groups, render
from eval.reporting.pictures import Shown, choose

DATA = REPOSITORY / "miniature" / "data"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A report on two folders of real images: copies of the training set, and unrelated ones."""
    out = tmp_path_factory.mktemp("report")
    flags = ["--train_data_dir", str(DATA / "finetune"), "--heldout_data_dir", str(DATA / "heldout")]
    given = [f"copies={DATA / 'finetune'}", f"others={DATA / 'heldout'}"]
    assert evaluate(["--generated_dir", *given, *flags, "--output_dir", str(out)]) == 0
    return out


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.headings, self.ids = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if "id" in attributes:
            self.ids.append(attributes["id"])


def test_the_page_needs_no_network(finished):
    text = (finished / "index.html").read_text()
    for tag, attributes in Page(text).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for key in ("src", "href", "srcset"):
            assert attributes.get(key, "data:").startswith(("data:", "#"))
    assert "url(" not in text and "@import" not in text
    (script,) = re.findall(r"<script[^>]*>(.*?)</script>", text, re.S)  # inline, and the policy allows no other
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|sendBeacon|EventSource|import\(|https?:", script)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policies = [a["content"] for t, a in Page(text).tags if a.get("http-equiv") == "Content-Security-Policy"]
    allowed = {"default-src 'none'", "img-src data:", "style-src 'unsafe-inline'", f"script-src 'sha256-{digest}'"}
    assert len(policies) == 1 and allowed <= set(policies[0].split("; "))
    for svg in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", text):
        drawing = base64.b64decode(svg).decode()
        assert not re.search(r'(href|src)="https?:', drawing)


def test_the_page_can_be_read_without_eyes(finished):
    page = Page((finished / "index.html").read_text())
    assert ("html", {"lang": "en"}) in page.tags
    images = [a for t, a in page.tags if t == "img"]
    assert images and all(len(a.get("alt", "")) > 10 for a in images)
    assert page.headings[0] == 1 and page.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(page.headings, page.headings[1:], strict=False))
    tags = [t for t, _ in page.tags]
    assert "caption" in tags and "main" in tags and "title" in tags
    assert all("scope" in a for t, a in page.tags if t == "th")
    regions = [a.get("aria-label") for _, a in page.tags if a.get("role") == "region"]
    assert all(regions) and len(set(regions)) == len(regions)
    links = [a["href"][1:] for t, a in page.tags if t == "a"]
    assert "verdict" in links and set(links) <= set(page.ids)
    assert {a["for"] for t, a in page.tags if t == "label"} == {a["id"] for t, a in page.tags if t == "input"}
    assert len(page.ids) == len(set(page.ids))


def test_json_first_and_the_page_from_it(finished):
    before = (finished / "index.html").read_bytes()
    (finished / "index.html").unlink()
    assert main([str(finished)]) == 0
    assert (finished / "index.html").read_bytes() == before


def test_names_and_captions_are_escaped(finished):
    report = json.loads((finished / "report.json").read_text())
    evil = '<script>alert("x")</script>'
    report["models"]["copies"]["samplers"]["given"]["images"][0]["prompt"] = evil
    report["models"][evil] = report["models"].pop("others")
    page = render(report, finished)
    assert evil not in page and "&lt;script&gt;" in page


def test_a_report_that_is_not_there_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_pairs_show_the_closest_first_and_the_same_random_ones(finished):
    report = json.loads((finished / "report.json").read_text())
    figures = report["models"]["others"]["samplers"]["given"]
    top, _, some = pair_groups(figures, report, Shown(report, "", choose("all", None)))
    shown = [r["similarity_to_train"] for r in top["rows"]]
    assert shown == sorted((r["similarity_to_train"] for r in figures["images"]), reverse=True)[: len(shown)]
    again = pair_groups(figures, report, Shown(report, "", choose("all", None)))[2]
    assert some == again and not {r["file"] for r in some["rows"]} & {r["file"] for r in top["rows"]}
