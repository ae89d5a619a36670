"""The model card: README.md of an adapter folder, for people and for the Hugging Face hub.

The front matter is `card_metadata`'s. Names and numbers from anywhere are escaped, so that they stay text. The base's
license is what its own folder states, never a guess. It knows `RunSummary` and no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from kitout.evaluate.compare import Comparison, MetricChange
from kitout.evaluate.metrics.measure import Score
from kitout.evaluate.metrics.per_class import ClassScore
from kitout.evaluate.report.card_metadata import UNKNOWN_LICENSE, render_front_matter
from kitout.evaluate.report.section import Section
from kitout.evaluate.report.summary import FactTable, RunSummary, format_fact
from kitout.evaluate.sets.forgetting import SetChange, forgetting_line, forgetting_rows
from kitout.files.atomic import write_text

MAX_LICENSE_BYTES = 2**20  # of a file that is searched for a license
LICENSE_PATTERNS = {  # how a license's own text begins
    "apache-2.0": r"apache license\s+version 2\.0",
    "mit": r"mit license|permission is hereby granted, free of charge, to any person obtaining a copy",
    "bsd-3-clause": r"bsd 3-clause",
    "gpl-3.0": r"gnu general public license\s+version 3",
    "agpl-3.0": r"gnu affero general public license\s+version 3",
}


def write_model_card(summary: RunSummary, folder: Path) -> Path:
    """The card in an adapter folder."""
    return write_text(folder / "README.md", render_model_card(summary))


def render_model_card(summary: RunSummary) -> str:
    """The text of the card."""
    s = summary
    comparison = s.comparisons.get(s.adapter)
    hashed = {"sha256 of all examples": s.data_hash} if s.data_hash else {}
    labels = {"labels, in order": list(s.labels)} if s.labels else {}
    intro = (
        f"An adapter for **{_escape_line(s.model)}**, trained with {_escape_line(s.method)} by kitout. It contains no "
        f"weights of the base, which has its own license ({_escape_line(s.license) or UNKNOWN_LICENSE}).\n"
    )
    sections = [
        f"---\n{render_front_matter(s, comparison)}\n---\n",
        f"# {_escape_line(s.title)}\n",
        intro,
        _results_section(comparison) if comparison else "",
        _seeds_section(s),
        _classes_section(s.per_class.get(s.adapter, ())),
        _forgetting_section(s.forgetting.get(s.adapter, ())),
        *map(_own_section, s.sections),
        _usage_section(s),
        _facts_section("Data", {**s.data, **hashed, **labels}),
        _facts_section("Training cost", s.cost),
        _facts_section("Merge proof", s.checked),
        f"## Settings\n\n{_code_block(s.config, 'yaml')}" if s.config else "",
        _limitations_section(s, comparison),
    ]
    return "\n".join(section for section in sections if section)


def _results_section(comparison: Comparison) -> str:
    rows = [
        f"| {change.title}{' (%)' if change.base.share else ''}"
        f"{'' if change.base.higher_is_better else ', lower is better'} | {_format_score(change, change.base)} | "
        f"{_format_score(change, change.tuned)} "
        f"| {change.format_value(change.difference, sign=True)} ({change.format_value(change.low, sign=True)} to "
        f"{change.format_value(change.high, sign=True)}) | {change.base.n:,} |"
        for change in comparison.changes
    ]
    baseline = comparison.baseline
    head = f"| metric | {baseline} | fine-tuned | difference | test examples |\n|---|---|---|---|---|"
    foot = (
        "On the test split, with 95 % confidence intervals. The interval of the difference is paired by example; where "
        "it contains 0, the difference is not significant."
    )
    if comparison.smallest_text:
        foot += f" {comparison.smallest_text[:1].upper()}{comparison.smallest_text[1:]}."
    return "\n".join(
        [f"## Results: {baseline} vs. fine-tuned\n", f"{comparison.verdict}.\n", head, *rows, "", f"{foot}\n"]
    )


def _seeds_section(s: RunSummary) -> str:
    """The adapter among the seeds of its method, and the method among others."""
    rows, verdicts = [], []
    for one in s.by_method:
        for method in one.methods:
            if method.name == s.method_name and len(method.seeds) > 1:
                values = ", ".join(f"{one.format_value(own.value)} (seed {own.seed})" for own in method.seeds)
                rows.append(f"| {one.title} | {one.format_value(method.mean)} | {values} |")
                verdicts += [f"- {one.title}: {_escape_line(text)}" for text in one.verdicts_of(method.name)]
    if not rows:
        return ""
    head = f"## Over seeds\n\nThis adapter is one seed of {_escape_line(s.method_name)}.\n"
    return "\n".join(
        [head, "| metric | mean | each seed |\n|---|---|---|", *rows, "", *verdicts, *([""] * bool(verdicts))]
    )


def _forgetting_section(changes: Sequence[SetChange]) -> str:
    if not changes:
        return ""
    head, *rows = forgetting_rows(changes)
    lines = [head, ("---",) * len(head), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## Forgetting\n\nOn sets that it was not trained for: {forgetting_line(changes)}.\n\n{table}\n"


def _own_section(section: Section) -> str:
    """Of the kind of run: its table."""
    if not section.table:
        return ""
    head, *rows = [" | ".join(map(_escape_line, row)) for row in section.table]
    lines = [head, "|".join(["---"] * len(section.table[0])), *rows]
    table = "\n".join(f"| {line} |" if line[0] != "-" else f"|{line}|" for line in lines)
    return f"## {_escape_line(section.title)}\n\n{table}\n" + (f"\n{section.caption}\n" if section.caption else "")


def _classes_section(scores: Sequence[ClassScore]) -> str:
    if not scores:
        return ""
    rows = [
        f"| {_escape_line(one.name)} | {one.n:,} | {100 * one.recall:.1f} | {100 * one.precision:.1f} "
        f"| {100 * one.f1:.1f} |"
        for one in scores
    ]
    head = "| class | test examples | recall (%) | precision (%) | F1 (%) |\n|---|---|---|---|---|"
    return "\n".join(["## Class by class\n", head, *rows, ""])


def _format_score(change: MetricChange, score: Score) -> str:
    return f"{change.format_value(score.value)} ({change.format_value(score.low)} to {change.format_value(score.high)})"


def _usage_section(s: RunSummary) -> str:
    """Code and commands that run as they are, once FOLDER (and BASE) are replaced."""
    steps = s.next_steps.get(s.adapter)
    if steps is None:
        return ""
    python, shell = _code_block("\n".join(steps.python_lines), "python"), _code_block("\n".join(steps.commands), "sh")
    image = "; IMAGE: an image file" if steps.is_image else ""
    base = f"; BASE: a folder with the base, **{_escape_line(s.model)}**" if steps.base else ""
    servers = "".join(f"\n{_escape_line(note)}.\n" for note in s.servers)
    return (
        f"## How to use it\n\nFOLDER: where this file is{base}{image}; FILE: a table or a folder.\n\n"
        f"{python}\n{shell}\n"
        "It loads on this base only. `p.kit` is the base with its adapters: several can be active at once, one per row "
        "of a batch, and `p.kit.merged_copy(...)` merges one into an ordinary model, if its method can be merged.\n"
        f"{servers}"
    )


def _facts_section(title: str, facts: FactTable) -> str:
    if not facts:
        return ""
    rows = "\n".join(f"| {_escape_line(what)} | {_escape_line(format_fact(value))} |" for what, value in facts.items())
    return f"## {title}\n\n| | |\n|---|---|\n{rows}\n"


def _limitations_section(s: RunSummary, comparison: Comparison | None) -> str:
    evaluated = (
        f"It was evaluated on {comparison.changes[0].base.n:,} test examples like those it was trained on, and on "
        f"{'the sets of forgetting above' if s.forgetting else 'nothing else'}: its effect on other tasks and on "
        "other data is not known."
        if comparison
        else "It was not evaluated on a test split."
    )
    return "## Limitations\n\n" + "\n".join(f"- {_escape_line(note)}" for note in [evaluated, *s.notes]) + "\n"


def _code_block(text: str, language: str) -> str:
    """A code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _escape_line(text: str) -> str:
    """On one line, with nothing that Markdown or HTML would act on."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(str(text).split())).replace("\\<", "&lt;")


def find_license(folder: Path | None) -> str:
    """What a model's folder states: in its README's front matter, its config, or a license text."""
    if folder is None or not folder.is_dir():
        return UNKNOWN_LICENSE
    for stated in (
        _license_in_readme(folder / "README.md"),
        _license_in_config(folder / "config.json"),
        _license_in_text(folder),
    ):
        if isinstance(stated, str) and stated.strip():
            return " ".join(stated.split())[:80].lower()
    return UNKNOWN_LICENSE


def _license_in_readme(file: Path) -> Any:
    front_matter = re.match(r"---\s*\n(.*?)\n---", _read_small_file(file), re.DOTALL)
    if not front_matter:
        return None
    reader = YAML(typ="safe", pure=True)
    reader.allow_duplicate_keys = True  # the file is not ours
    try:
        fields = reader.load(front_matter[1])
    except YAMLError:
        return None
    if not isinstance(fields, dict):
        return None
    return fields.get("license_name" if fields.get("license") == "other" else "license")


def _license_in_config(file: Path) -> Any:
    try:
        config = json.loads(_read_small_file(file) or "null")
    except ValueError:
        return None
    return config.get("license") if isinstance(config, dict) else None


def _license_in_text(folder: Path) -> Any:
    for file_name in ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE"):
        text = " ".join(_read_small_file(folder / file_name)[:2000].lower().split())
        for name, pattern in LICENSE_PATTERNS.items():
            if re.search(pattern, text):
                return name
    return None


def _read_small_file(file: Path) -> str:
    if not file.is_file() or file.stat().st_size > MAX_LICENSE_BYTES:
        return ""
    return file.read_text(encoding="utf-8", errors="replace")
