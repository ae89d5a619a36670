"""From what a wheel ships to tidy data: one JSON object per line with the same few columns, images as one npz.

Columns by kind: classify text, label; answer prompt, response; choice question, choices, answer (an index); preference
prompt, chosen, rejected; text text. Each function takes the folder of unpacked members and an empty folder to fill.
Rows are kept as found: cleaning and shuffling belong to who trains. It knows no wheel or cache.
"""

from __future__ import annotations

import ast
import csv
import gzip
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
CHATTER_TOPICS = ("tech_support", "trivia", "computers", "history", "science", "food", "greetings")


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _write(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _only(raw: Path, ending: str = "*.jsonl") -> Path:
    (path,) = raw.glob(ending)
    return path


def tweets(raw: Path, out: Path) -> None:
    # the file mixes encodings: undecodable bytes become U+FFFD, as they already are in a few hundred rows
    with _only(raw, "*.csv").open(encoding="utf-8", errors="replace", newline="") as file:
        rows = [{"text": row["text"].strip(), "label": row["sentiment"]} for row in csv.DictReader(file)]
    _write(out / "tweets.jsonl", rows)


def boolq(raw: Path, out: Path) -> None:
    """The 12,697 labelled rows of `combined` are train and dev together: what `dev` asks is taken out of train."""
    dev = _read(raw / "dev.jsonl")
    asked = {row["question"] for row in dev}
    labelled = [row for row in _read(raw / "combined.jsonl") if "label" in row and row["question"] not in asked]
    _write(out / "train.jsonl", (_boolq_row(row["passage"], row["question"], row["label"]) for row in labelled))
    _write(out / "dev.jsonl", (_boolq_row(row["passage"], row["question"], row["answer"]) for row in dev))


def _boolq_row(passage: str, question: str, answer: object) -> Row:
    response = "yes" if str(answer) == "True" else "no"
    return {"prompt": f"{passage}\nQuestion: {question}?\nAnswer yes or no.", "response": response}


def _letterless(text: str) -> str:
    return re.sub(r"^[A-J]\.\s*", "", text).strip()


def _parsed(path: Path) -> Iterator[Row]:
    for row in _read(path):
        options = [_letterless(line) for line in row["options"].strip().split("\n") if line.strip()]
        gold = row["answer"][0] if isinstance(row["answer"], list) else row["answer"]
        if _letterless(gold) in options:
            question = f"{row.get('passage', '')} {row['question']}".strip()
            yield {"question": question, "choices": options, "answer": options.index(_letterless(gold))}


def choices(raw: Path, out: Path) -> None:
    _write(out / "choices.jsonl", _parsed(_only(raw)))


def asdiv(raw: Path, out: Path) -> None:
    _answers(out, ((f"{row['passage']} {row['question']}", row["answer"]) for row in _read(_only(raw))))


def privacy(raw: Path, out: Path) -> None:
    rows = _read(_only(raw))
    _answers(out, ((f"{r['context']}\n{r['question']}", "yes" if str(r["answer"]) == "True" else "no") for r in rows))


def xsum(raw: Path, out: Path) -> None:
    _answers(out, ((f"{r['document']}\nSummarise this in one sentence.", r["summary"]) for r in _read(_only(raw))))


def _answers(out: Path, pairs: Iterable[tuple[str, str]]) -> None:
    _write(out / "answers.jsonl", ({"prompt": prompt, "response": response} for prompt, response in pairs))


def wiki(raw: Path, out: Path) -> None:
    _write(out / "texts.jsonl", ({"text": row["text"]} for row in _read(_only(raw))))


def piqa_pairs(raw: Path, out: Path) -> None:
    rows = [row for row in _parsed(_only(raw)) if len(row["choices"]) == 2]
    _pairs(out, ((r["question"], r["choices"][r["answer"]], r["choices"][1 - r["answer"]]) for r in rows))


def factual_pairs(raw: Path, out: Path) -> None:
    ask = "Summarise this in one sentence."
    rows = _read(_only(raw))
    _pairs(out, ((f"{r['article_sent']}\n{ask}", r["correct_sent"], r["incorrect_sent"]) for r in rows))


def nq_pairs(raw: Path, out: Path) -> None:
    """Every (first gold, judged wrong) pair; the lists are written as Python literals in the source."""
    rows = ((r["question"], _list(r["answer"]), _list(r["def_incorrect_predictions"])) for r in _read(_only(raw)))
    _pairs(out, ((f"{ask}?", gold[0], wrong) for ask, gold, bad in rows if gold for wrong in dict.fromkeys(bad)))


def _list(value: object) -> list[str]:
    found = ast.literal_eval(value) if isinstance(value, str) and value.strip() else value
    return [str(item) for item in found] if isinstance(found, list | tuple) else []


def _pairs(out: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    _write(out / "pairs.jsonl", ({"prompt": p, "chosen": good, "rejected": bad} for p, good, bad in rows))


def chat(raw: Path, out: Path) -> None:
    """The first two lines of each conversation; further lines are other answers to the same question in this corpus."""
    from ruamel.yaml import YAML

    reader = YAML(typ="safe", pure=True)
    files = sorted(raw.glob("*.yml"))
    talks = [talk for file in files for talk in reader.load(file.read_text(encoding="utf-8"))["conversations"]]
    _answers(out, ((str(talk[0]), str(talk[1])) for talk in talks if len(talk) >= 2))


def mnist(raw: Path, out: Path) -> None:
    import numpy as np

    with gzip.open(_only(raw, "*.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    images, labels = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(np.int64)
    np.savez_compressed(out / "images.npz", images=images, labels=labels)


def orange(raw: Path, out: Path) -> None:
    """Orange's .tab: three header lines, then label and text separated by a tab."""
    csv.field_size_limit(10_000_000)
    for path in sorted(raw.glob("*.tab")):
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in list(csv.reader(file, delimiter="\t"))[3:] if len(row) > 1 and row[0]]
        split = "train" if "train" in path.stem else "test"
        _write(out / f"{split}.jsonl", ({"text": row[1], "label": row[0]} for row in rows))
