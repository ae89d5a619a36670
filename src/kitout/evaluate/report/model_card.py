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

from kitout.evaluate.compare import Change, Comparison
from kitout.evaluate.report.summary import Facts, Summary, words
from kitout.files.atomic import write_text

UNKNOWN = "unknown: see the base"
MOST = 2**20  # bytes of a file that is looked into for a licence
WORDINGS = {  # how a licence's own text begins
    "apache-2.0": r"apache license\s+version 2\.0",
    "mit": r"mit license|permission is hereby granted, free of charge, to any person obtaining a copy",
    "bsd-3-clause": r"bsd 3-clause",
    "gpl-3.0": r"gnu general public license\s+version 3",
    "agpl-3.0": r"gnu affero general public license\s+version 3",
}
HUB_TASKS = {
    "AutoModelForCausalLM": "text-generation", "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForImageClassification": "image-classification",
}  # fmt: skip
LOADERS = {
    "classification": "AutoModelForSequenceClassification", "regression": "AutoModelForSequenceClassification",
    "multilabel": "AutoModelForSequenceClassification", "tokens": "AutoModelForTokenClassification",
}  # fmt: skip
WRITERS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


def write(summary: Summary, folder: Path) -> Path:
    """The card in an adapter folder."""
    return write_text(folder / "README.md", card(summary))


def card(summary: Summary) -> str:
    """The text of the card."""
    s = summary
    comparison = s.comparisons.get(s.adapter)
    data = dict(s.data)
    if s.data_hash:
        data["sha256 of all examples"] = s.data_hash
    if s.labels:
        data["labels, in order"] = list(s.labels)
    intro = (
        f"An adapter for **{_line(s.model)}** by {_line(s.method)}, made with kitout. It holds no weights of the base, "
        f"which has its own licence ({_line(s.licence) or UNKNOWN}).\n"
    )
    parts = [
        f"---\n{_front(s, comparison)}\n---\n",
        f"# {_line(s.title)}\n",
        intro,
        _results(comparison) if comparison else "",
        _use(s),
        _facts("Data", data),
        _facts("Cost of training", s.cost),
        _facts("Merged and unmerged", s.checked),
        f"## Settings\n\n{_fenced(s.config, 'yaml')}" if s.config else "",
        _limits(s, comparison),
    ]
    return "\n".join(part for part in parts if part)


def _front(s: Summary, comparison: Comparison | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=HUB_TASKS.get(_loader(s), "other"), dataset_type=_slug(s.data_name), dataset_name=s.data_name,
            metric_type=change.name, metric_name=change.title, metric_value=round(change.tuned.value, 6),
        )
        for change in (comparison.changes if comparison and s.data_name else ())
    ]  # fmt: skip
    known = re.fullmatch(r"[a-z0-9.+-]{1,40}", s.licence)
    method = re.match(r"\w+", s.method)
    data = ModelCardData(
        base_model=s.model if re.fullmatch(r"[\w.-]+/[\w.-]+", s.model) else None,
        library_name="kitout",
        license=s.licence if known else "other",
        license_name=None if known else UNKNOWN,
        tags=["kitout", "adapter", *([method[0].lower()] if method else [])],
        model_name=s.adapter if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _results(comparison: Comparison) -> str:
    rows = [
        f"| {change.title}{' (%)' if change.base.share else ''} | {_score(change, 'base')} | {_score(change, 'tuned')} "
        f"| {change.told(change.difference, sign=True)} ({change.told(change.low, sign=True)} to "
        f"{change.told(change.high, sign=True)}) | {change.base.n:,} |"
        for change in comparison.changes
    ]
    head = "| metric | base | with the adapter | difference | examples |\n|---|---|---|---|---|"
    foot = (
        "On examples that were held out; in brackets the 95 % intervals, that of the difference taken example by "
        "example."
    )
    return "\n".join(["## What it did\n", f"{comparison.verdict}.\n", head, *rows, "", f"{foot}\n"])


def _score(change: Change, side: str) -> str:
    score = change.base if side == "base" else change.tuned
    return f"{change.told(score.value)} ({change.told(score.low)} to {change.told(score.high)})"


def _loader(s: Summary) -> str:
    return s.loader or LOADERS.get(s.task, "AutoModelForCausalLM")


def _use(s: Summary) -> str:
    """Lines that run as they stand, once the folder's place is filled in."""
    loader, opened, name = _loader(s), json.dumps(s.opened or s.model), json.dumps(s.adapter)
    settings = s.opening or ({"num_labels": len(s.labels)} if s.labels else {})
    classes = "".join(f", {name}={value!r}" for name, value in settings.items())
    code = [
        "import kitout",
        f"from transformers import {loader}" + (", AutoTokenizer" if loader in WRITERS else ""),
        "",
        f"model = {loader}.from_pretrained({opened}{classes})",
        "kit = kitout.attach(model.eval())",
        f'kit.load("FOLDER", name={name})  # this folder',
        f"kit.use({name})  # kit.use(None) is the base again, bit for bit",
        "",
    ]
    if loader in WRITERS:
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
    block = _fenced("\n".join(code), "python")
    return (
        f"## How to use it\n\n{block}\nLoading refuses any other base. Several adapters can be worn at once, one per "
        "row of a batch; `kit.merged_copy(...)` folds one into an ordinary model where its method allows it.\n"
    )


def _facts(title: str, facts: Facts) -> str:
    if not facts:
        return ""
    rows = "\n".join(f"| {_line(what)} | {_line(words(value))} |" for what, value in facts.items())
    return f"## {title}\n\n| | |\n|---|---|\n{rows}\n"


def _limits(s: Summary, comparison: Comparison | None) -> str:
    measured = (
        f"It was measured on {comparison.changes[0].base.n:,} examples like those it learnt from, and on nothing else: "
        "what it does to other abilities of the base, and on other data, is not known."
        if comparison
        else "It was not measured on held-out examples."
    )
    return "## Limits\n\n" + "\n".join(f"- {_line(note)}" for note in [measured, *s.notes]) + "\n"


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _line(text: str) -> str:
    """On one line, with nothing that Markdown or HTML would act on."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(str(text).split())).replace("\\<", "&lt;")


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-").lower() or "data"


def licence_of(folder: Path | None) -> str:
    """What a model's folder states: its README's front matter, its config, or a licence's own text; else `UNKNOWN`."""
    if folder is None or not folder.is_dir():
        return UNKNOWN
    for stated in (_of_readme(folder / "README.md"), _of_json(folder / "config.json"), _of_text(folder)):
        if isinstance(stated, str) and stated.strip():
            return " ".join(stated.split())[:80].lower()
    return UNKNOWN


def _of_readme(file: Path) -> Any:
    found = re.match(r"---\s*\n(.*?)\n---", _read(file), re.DOTALL)
    if not found:
        return None
    reader = YAML(typ="safe", pure=True)
    reader.allow_duplicate_keys = True  # others wrote it
    try:
        front = reader.load(found[1])
    except YAMLError:
        return None
    return front.get("license") if isinstance(front, dict) else None


def _of_json(file: Path) -> Any:
    try:
        held = json.loads(_read(file) or "null")
    except ValueError:
        return None
    return held.get("license") if isinstance(held, dict) else None


def _of_text(folder: Path) -> Any:
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE"):
        text = " ".join(_read(folder / name)[:2000].lower().split())
        for licence, wording in WORDINGS.items():
            if re.search(wording, text):
                return licence
    return None


def _read(file: Path) -> str:
    if not file.is_file() or file.stat().st_size > MOST:
        return ""
    return file.read_text(encoding="utf-8", errors="replace")
