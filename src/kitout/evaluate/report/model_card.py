"""README.md of an adapter folder: what it is, what it did, and how to use it, for people and for the hub.

Front matter as the Hugging Face hub reads it, through huggingface_hub. Names and figures from anywhere are written so
that they stay text. The base's licence is what its own folder states, never a guess. It knows a `Summary` and no model.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from kitout.evaluate.compare import Comparison, MetricChange
from kitout.evaluate.report.summary import FactTable, RunSummary, format_fact
from kitout.files.atomic import write_text

UNKNOWN_LICENSE = "unknown: see the base"
MAX_LICENSE_BYTES = 2**20  # bytes of a file that is looked into for a licence
LICENSE_PATTERNS = {  # how a licence's own text begins
    "apache-2.0": r"apache license\s+version 2\.0",
    "mit": r"mit license|permission is hereby granted, free of charge, to any person obtaining a copy",
    "bsd-3-clause": r"bsd 3-clause",
    "gpl-3.0": r"gnu general public license\s+version 3",
    "agpl-3.0": r"gnu affero general public license\s+version 3",
}
GENERATING_LOADERS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


def write_model_card(summary: RunSummary, folder: Path) -> Path:
    """The card in an adapter folder."""
    return write_text(folder / "README.md", render_model_card(summary))


def render_model_card(summary: RunSummary) -> str:
    """The text of the card."""
    s = summary
    comparison = s.comparisons.get(s.adapter)
    data = dict(s.data)
    if s.data_hash:
        data["sha256 of all examples"] = s.data_hash
    if s.labels:
        data["labels, in order"] = list(s.labels)
    intro = (
        f"An adapter for **{_escape_line(s.model)}** by {_escape_line(s.method)}, made with kitout. It holds no "
        "weights of the base, "
        f"which has its own licence ({_escape_line(s.license) or UNKNOWN_LICENSE}).\n"
    )
    parts = [
        f"---\n{_front_matter(s, comparison)}\n---\n",
        f"# {_escape_line(s.title)}\n",
        intro,
        _results_section(comparison) if comparison else "",
        _usage_section(s),
        _facts_section("Data", data),
        _facts_section("Cost of training", s.cost),
        _facts_section("Merged and unmerged", s.checked),
        f"## Settings\n\n{_code_block(s.config, 'yaml')}" if s.config else "",
        _limits_section(s, comparison),
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(s: RunSummary, comparison: Comparison | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=s.hub_task or "other",
            dataset_type=_slug(s.data_name),
            dataset_name=s.data_name,
            metric_type=change.name,
            metric_name=change.title,
            metric_value=round(change.tuned.value, 6),
        )
        for change in (comparison.changes if comparison and s.data_name else ())
    ]
    known = re.fullmatch(r"[a-z0-9.+-]{1,40}", s.license)
    method = re.match(r"\w+", s.method)
    data = ModelCardData(
        base_model=s.model if re.fullmatch(r"[\w.-]+/[\w.-]+", s.model) else None,
        library_name="kitout",
        license=s.license if known else "other",
        license_name=None if known else UNKNOWN_LICENSE,
        tags=["kitout", "adapter", *([method[0].lower()] if method else [])],
        model_name=s.adapter if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _results_section(comparison: Comparison) -> str:
    rows = [
        f"| {change.title}{' (%)' if change.base.share else ''} | {_format_score(change, 'base')} | "
        f"{_format_score(change, 'tuned')} "
        f"| {change.format_value(change.difference, sign=True)} ({change.format_value(change.low, sign=True)} to "
        f"{change.format_value(change.high, sign=True)}) | {change.base.n:,} |"
        for change in comparison.changes
    ]
    head = "| metric | base | with the adapter | difference | examples |\n|---|---|---|---|---|"
    foot = (
        "On examples that were held out; in brackets the 95 % intervals, that of the difference taken example by "
        "example."
    )
    return "\n".join(["## What it did\n", f"{comparison.verdict}.\n", head, *rows, "", f"{foot}\n"])


def _format_score(change: MetricChange, side: str) -> str:
    score = change.base if side == "base" else change.tuned
    return f"{change.format_value(score.value)} ({change.format_value(score.low)} to {change.format_value(score.high)})"


def _loader_name(s: RunSummary) -> str:
    return s.loader or "AutoModelForCausalLM"


def _usage_section(s: RunSummary) -> str:
    """Lines that run as they stand, once the folder's place is filled in."""
    loader, opened, name = _loader_name(s), json.dumps(s.base_path or s.model), json.dumps(s.adapter)
    settings = s.from_pretrained_kwargs or ({"num_labels": len(s.labels)} if s.labels else {})
    classes = "".join(f", {name}={value!r}" for name, value in settings.items())
    code = [
        "import kitout",
        f"from transformers import {loader}" + (", AutoTokenizer" if loader in GENERATING_LOADERS else ""),
        "",
        f"model = {loader}.from_pretrained({opened}{classes})",
        "kit = kitout.attach(model.eval())",
        f'kit.load("FOLDER", name={name})  # this folder',
        f"kit.use({name})  # kit.use(None) is the base again, bit for bit",
        "",
    ]
    if loader in GENERATING_LOADERS:
        asked = (
            [
                'turns = [{"role": "user", "content": "a prompt of the kind it was trained on"}]',
                'how = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}',
                "batch = tokenizer.apply_chat_template(turns, **how)",
            ]
            if s.chat
            else ['batch = tokenizer("a prompt of the kind it was trained on", return_tensors="pt")']
        )
        code += [
            f"tokenizer = AutoTokenizer.from_pretrained({opened})",
            *asked,
            "print(tokenizer.decode(kit.generate(**batch, max_new_tokens=64)[0], skip_special_tokens=True))",
        ]
    else:
        code.append("# kit(**batch).logits: one number per label, in the order they are listed below")
    block = _code_block("\n".join(code), "python")
    return (
        f"## How to use it\n\n{block}\nLoading refuses any other base. Several adapters can be worn at once, one per "
        "row of a batch; `kit.merged_copy(...)` folds one into an ordinary model where its method allows it.\n"
    )


def _facts_section(title: str, facts: FactTable) -> str:
    if not facts:
        return ""
    rows = "\n".join(f"| {_escape_line(what)} | {_escape_line(format_fact(value))} |" for what, value in facts.items())
    return f"## {title}\n\n| | |\n|---|---|\n{rows}\n"


def _limits_section(s: RunSummary, comparison: Comparison | None) -> str:
    measured = (
        f"It was measured on {comparison.changes[0].base.n:,} examples like those it learnt from, and on nothing else: "
        "what it does to other abilities of the base, and on other data, is not known."
        if comparison
        else "It was not measured on held-out examples."
    )
    return "## Limits\n\n" + "\n".join(f"- {_escape_line(note)}" for note in [measured, *s.notes]) + "\n"


def _code_block(text: str, language: str) -> str:
    """A code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _escape_line(text: str) -> str:
    """On one line, with nothing that Markdown or HTML would act on."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(str(text).split())).replace("\\<", "&lt;")


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-").lower() or "data"


def find_license(folder: Path | None) -> str:
    """What a model's folder states: its README's front matter, its config, or a licence's own text; else `UNKNOWN`."""
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
    found = re.match(r"---\s*\n(.*?)\n---", _read_small_file(file), re.DOTALL)
    if not found:
        return None
    reader = YAML(typ="safe", pure=True)
    reader.allow_duplicate_keys = True  # others wrote it
    try:
        front = reader.load(found[1])
    except YAMLError:
        return None
    return front.get("license") if isinstance(front, dict) else None


def _license_in_config(file: Path) -> Any:
    try:
        held = json.loads(_read_small_file(file) or "null")
    except ValueError:
        return None
    return held.get("license") if isinstance(held, dict) else None


def _license_in_text(folder: Path) -> Any:
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE"):
        text = " ".join(_read_small_file(folder / name)[:2000].lower().split())
        for licence, wording in LICENSE_PATTERNS.items():
            if re.search(wording, text):
                return licence
    return None


def _read_small_file(file: Path) -> str:
    if not file.is_file() or file.stat().st_size > MAX_LICENSE_BYTES:
        return ""
    return file.read_text(encoding="utf-8", errors="replace")
