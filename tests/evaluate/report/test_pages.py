"""The report is one file that requests nothing, the card says how to load; text from anywhere stays text in both."""

from __future__ import annotations

import ast
import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from kitout.evaluate.compare import Comparison, compare, pick_examples
from kitout.evaluate.metrics.confusion import Confusion
from kitout.evaluate.metrics.registry import compute_measures
from kitout.evaluate.report import html, model_card
from kitout.evaluate.report.charts import Chart, Series
from kitout.evaluate.report.next_steps import NextSteps
from kitout.evaluate.report.summary import RunSummary, format_fact
from kitout.evaluate.report.thumbnails import PredictedImages

EVIL = "</pre><script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\" {{ 7 * 7 }} | `a` \u202e"
NAMES = ["yes", "no", EVIL]
REFERENCES = [NAMES[i % 3] for i in range(60)]
BASE = [NAMES[i % 2] for i in range(60)]
TUNED = [NAMES[i % 3] if i % 5 else "no" for i in range(60)]


def comparison() -> Comparison:
    examples = pick_examples([f"{EVIL} {i}" for i in range(60)], REFERENCES, BASE, TUNED)
    return compare(
        compute_measures("generation", BASE, REFERENCES), compute_measures("generation", TUNED, REFERENCES), examples
    )


def full_summary() -> RunSummary:
    return RunSummary(
        title=f"A run {EVIL}",
        model=EVIL,
        method=f"LoRA(rank=4) {EVIL}",
        comparisons={"adapter": comparison()},
        data={"train": 1280, EVIL: EVIL, "sizes": [1, 2.5], "truncated": None},
        preflight={"checked": True},
        estimates={EVIL: ("2 GiB", 1.5)},
        cost={"seconds": 81.25, "trained": 2442240},
        notes=[EVIL],
        config=f"model: {EVIL}\n```\nmore",
        charts=[Chart(title=EVIL, x_label=EVIL, series=[Series(name=EVIL, points=[(0, 1), (1, 2)])])],
        predicted_images={"adapter": PredictedImages([Image.new("RGB", (4, 4))], [EVIL], [EVIL], 1)},
        confusions={"adapter": Confusion((EVIL, "b"), ((1, 2), (0, 1)))},
        files={EVIL: EVIL},
        task="generation",
        data_name=EVIL,
        data_hash="ab12",
        license=EVIL,
        created="today",
        next_steps={"adapter": NextSteps(folder="FOLDER", text=EVIL, file=EVIL)},
        servers=[EVIL],
    )


class Page(HTMLParser):
    """What a browser makes of it: the tags, their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "line", "circle", "polyline", "polygon", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_report_contains_everything_and_requests_nothing() -> None:
    page = Page(html.render_html(full_summary()))
    assert not page.open
    assert "script" not in page.tags
    assert page.tags.count("img") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    links = [value for name, value in page.attributes if name in ("src", "href", "action", "data", "xlink:href")]
    assert [link[:23] for link in links if link] == ["data:image/jpeg;base64,"]
    assert not re.search(r"https?://|@import|url\(", html.render_html(full_summary()))
    policy = next(value for name, value in page.attributes if value and "default-src" in value)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    for text in (
        "accuracy",
        "macro-F1",
        "1,280",
        "81.25",
        "2,442,240",
        "today",
        "on the test split",
        "1, 2.5",
        "✓ correct",
    ):
        assert text in page.text, text
    assert page.text.count(EVIL) > 15
    assert comparison().verdict in " ".join(page.text.split())


def test_what_is_empty_is_not_shown() -> None:
    page = Page(html.render_html(RunSummary(title="t", model="m", method="LoRA()")))
    assert "h2" not in page.tags
    assert "table" not in page.tags
    two = Page(
        html.render_html(
            dataclasses.replace(full_summary(), comparisons={"legal": comparison(), "medic": comparison()})
        )
    )
    assert two.text.count("legal") == two.text.count("medic") == 3


def test_a_report_is_written_whole(tmp_path: Path) -> None:
    file = html.write_html(full_summary(), tmp_path / "report.html")
    assert file.read_text(encoding="utf-8") == html.render_html(full_summary())
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_metrics_that_are_not_fractions_have_no_whisker() -> None:
    references = [1.0, 2.5, 3.0]
    numbers = compare(
        compute_measures("regression", [1.0] * 3, references),
        compute_measures("regression", [1.0, 2.0, 3.0], references),
    )
    page = Page(html.render_html(RunSummary(title="t", model="m", method="x", comparisons={"a": numbers})))
    assert "svg" not in page.tags
    assert "lower is better" in page.text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234567, "1,234,567"), (1234.5, "1,234"), (0.123456, "0.1235"), (True, "yes"), (None, "none"), ("x", "x")],
)
def test_format_fact(value: Any, text: str) -> None:
    assert format_fact(value) == text


def front_matter(text: str) -> dict[str, Any]:
    fields = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(fields, dict)
    return fields


def test_the_card_is_read_by_the_hubs_own_reader() -> None:
    from huggingface_hub import ModelCard

    plain = dataclasses.replace(
        full_summary(),
        title="Tweets",
        model="org/model-1",
        hub_name="org/model-1",
        license="apache-2.0",
        data_name="my tweets",
        labels=["a", "b"],
    )
    read = ModelCard(model_card.render_model_card(plain))
    assert (read.data.base_model, read.data.license, read.data.library_name) == ("org/model-1", "apache-2.0", "kitout")
    assert read.data.tags == ["kitout", "adapter", "lora"]
    results = {r.metric_type: r for r in read.data.eval_results}
    assert list(results) == ["accuracy", "macro_f1", "exact_match", "token_f1"]
    assert results["accuracy"].metric_value == pytest.approx(comparison().changes[0].tuned.value, abs=1e-6)
    assert (results["accuracy"].dataset_name, results["accuracy"].dataset_type) == ("my tweets", "my-tweets")
    text = str(read)
    assert comparison().verdict in text
    assert "| sha256 of all examples | ab12 |" in text
    assert "| labels, in order | a, b |" in text
    assert "evaluated on 60 test examples" in text


def test_text_from_anywhere_stays_text_in_the_card() -> None:
    text = model_card.render_model_card(full_summary())
    assert front_matter(text)["license"] == "other"
    assert re.fullmatch(r"[a-z0-9.+-]+", front_matter(text)["license_name"])
    assert "base_model" not in front_matter(text)
    assert front_matter(text)["model-index"][0]["results"][0]["dataset"]["name"] == EVIL
    body = text.split("---\n", 2)[2]
    fenced = re.findall(r"^(`{3,})\w+\n(.*?)\n\1$", body, re.DOTALL | re.MULTILINE)
    assert [fence for fence, _ in fenced] == ["```", "```", "````"]
    for _, block in fenced:
        body = body.replace(block, "")
    assert "<script" not in body
    assert "<img" not in body
    assert all(row.count("|") - row.count("\\|") in (3, 6) for row in body.splitlines() if row.startswith("|"))
    (text_of_code,) = [n.value for n in ast.walk(ast.parse(fenced[0][1])) if isinstance(n, ast.Constant)][1:]
    assert text_of_code == EVIL  # as a string of the program


def test_a_card_without_results() -> None:
    text = model_card.render_model_card(RunSummary(title="t", model="m", method="IA3()"))
    assert "It was not evaluated" in text
    assert f"its own license ({model_card.UNKNOWN_LICENSE})" in text
    assert "## Results" not in text
    expected = {"library_name": "kitout", "license": "unknown"}
    assert front_matter(text) == expected | {"tags": ["kitout", "adapter", "ia3"]}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"README.md": "---\nlicense: MIT\ntags: [x]\n---\nlicense: gpl"}, "mit"),
        ({"README.md": "no front matter, license: mit", "config.json": '{"license": "apache-2.0"}'}, "apache-2.0"),
        ({"README.md": "---\n: [\n---\n", "config.json": "{", "LICENSE": "MIT License\n\nCopyright"}, "mit"),
        ({"LICENSE": "\n   Apache License\n      Version 2.0, January 2004"}, "apache-2.0"),
        ({"README.md": "---\nlicense: [a, b]\n---"}, model_card.UNKNOWN_LICENSE),
        ({"README.md": "---\n- a\n---", "config.json": "[1]", "LICENSE": "ask me"}, model_card.UNKNOWN_LICENSE),
        ({"README.md": "---\nlicense: '  '\n---"}, model_card.UNKNOWN_LICENSE),
        ({"README.md": "x" * (model_card.MAX_LICENSE_BYTES + 1)}, model_card.UNKNOWN_LICENSE),
        ({}, model_card.UNKNOWN_LICENSE),
    ],
)
def test_the_bases_license_is_what_its_folder_states(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert model_card.find_license(tmp_path) == expected


def test_a_base_without_a_folder_states_nothing() -> None:
    assert (
        model_card.find_license(None) == model_card.find_license(Path("no/such/folder")) == model_card.UNKNOWN_LICENSE
    )
