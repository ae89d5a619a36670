"""From what a wheel ships to tidy data: one JSON object per line with the same few columns, images as one npz.

Columns by kind: classify text, label; answer prompt, response; choice question, choices, answer (an index); preference
prompt, chosen, rejected; text text. Each function takes the folder of unpacked members and an empty folder to fill.
Rows stay as they are: cleaning and shuffling are up to whoever trains. It knows no wheel or cache.
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

JsonRow = dict[str, Any]
CHATTER_TOPICS = ("tech_support", "trivia", "computers", "history", "science", "food", "greetings")


def _read_jsonl(path: Path) -> list[JsonRow]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _write_jsonl(path: Path, rows: Iterable[JsonRow]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _single_file(raw: Path, pattern: str = "*.jsonl") -> Path:
    (path,) = raw.glob(pattern)
    return path


def convert_tweets(raw: Path, out: Path) -> None:
    # the file mixes encodings: undecodable bytes become U+FFFD, as they already are in a few hundred rows
    with _single_file(raw, "*.csv").open(encoding="utf-8", errors="replace", newline="") as file:
        rows = [{"text": row["text"].strip(), "label": row["sentiment"]} for row in csv.DictReader(file)]
    _write_jsonl(out / "tweets.jsonl", rows)


def convert_boolq(raw: Path, out: Path) -> None:
    """The 12,697 labeled rows of `combined` are train and dev together: the questions of dev are left out of train."""
    dev = _read_jsonl(raw / "dev.jsonl")
    dev_questions = {row["question"] for row in dev}
    combined = _read_jsonl(raw / "combined.jsonl")
    train = [row for row in combined if "label" in row and row["question"] not in dev_questions]
    _write_jsonl(out / "train.jsonl", (_to_boolq_row(row["passage"], row["question"], row["label"]) for row in train))
    _write_jsonl(out / "dev.jsonl", (_to_boolq_row(row["passage"], row["question"], row["answer"]) for row in dev))


def _to_boolq_row(passage: str, question: str, answer: object) -> JsonRow:
    response = "yes" if str(answer) == "True" else "no"
    return {"prompt": f"{passage}\nQuestion: {question}?\nAnswer yes or no.", "response": response}


def _strip_letter(text: str) -> str:
    return re.sub(r"^[A-J]\.\s*", "", text).strip()


def _parse_choices(path: Path) -> Iterator[JsonRow]:
    for row in _read_jsonl(path):
        options = [_strip_letter(line) for line in row["options"].strip().split("\n") if line.strip()]
        answer = _strip_letter(row["answer"][0] if isinstance(row["answer"], list) else row["answer"])
        if answer in options:
            question = f"{row.get('passage', '')} {row['question']}".strip()
            yield {"question": question, "choices": options, "answer": options.index(answer)}


def convert_choices(raw: Path, out: Path) -> None:
    _write_jsonl(out / "choices.jsonl", _parse_choices(_single_file(raw)))


def convert_asdiv(raw: Path, out: Path) -> None:
    _write_answers(
        out, ((f"{row['passage']} {row['question']}", row["answer"]) for row in _read_jsonl(_single_file(raw)))
    )


def convert_privacy(raw: Path, out: Path) -> None:
    rows = _read_jsonl(_single_file(raw))
    _write_answers(
        out, ((f"{r['context']}\n{r['question']}", "yes" if str(r["answer"]) == "True" else "no") for r in rows)
    )


def convert_xsum(raw: Path, out: Path) -> None:
    _write_answers(
        out,
        ((f"{r['document']}\nSummarise this in one sentence.", r["summary"]) for r in _read_jsonl(_single_file(raw))),
    )


def _write_answers(out: Path, pairs: Iterable[tuple[str, str]]) -> None:
    _write_jsonl(out / "answers.jsonl", ({"prompt": prompt, "response": response} for prompt, response in pairs))


def convert_wiki(raw: Path, out: Path) -> None:
    _write_jsonl(out / "texts.jsonl", ({"text": row["text"]} for row in _read_jsonl(_single_file(raw))))


def convert_piqa_pairs(raw: Path, out: Path) -> None:
    rows = [row for row in _parse_choices(_single_file(raw)) if len(row["choices"]) == 2]
    _write_pairs(out, ((r["question"], r["choices"][r["answer"]], r["choices"][1 - r["answer"]]) for r in rows))


def convert_factual_pairs(raw: Path, out: Path) -> None:
    """Three of the source's 371 pairs have two equal sentences, which says nothing; they are left out."""
    request = "Summarise this in one sentence."
    rows = _read_jsonl(_single_file(raw))
    pairs = ((f"{r['article_sent']}\n{request}", r["correct_sent"], r["incorrect_sent"]) for r in rows)
    _write_pairs(out, (pair for pair in pairs if pair[1].strip() != pair[2].strip()))


def convert_nq_pairs(raw: Path, out: Path) -> None:
    """Every pair of the first correct and an incorrect answer; the source writes the lists as Python literals."""
    rows = (
        (r["question"], _parse_list(r["answer"]), _parse_list(r["def_incorrect_predictions"]))
        for r in _read_jsonl(_single_file(raw))
    )
    pairs = (
        (f"{question}?", correct[0], answer)
        for question, correct, incorrect in rows
        if correct
        for answer in dict.fromkeys(incorrect)
    )
    _write_pairs(out, pairs)


def _parse_list(value: object) -> list[str]:
    parsed = ast.literal_eval(value) if isinstance(value, str) and value.strip() else value
    return [str(item) for item in parsed] if isinstance(parsed, list | tuple) else []


def _write_pairs(out: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    _write_jsonl(
        out / "pairs.jsonl",
        ({"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in rows),
    )


def convert_chat(raw: Path, out: Path) -> None:
    """The first two lines of each conversation; in this corpus further lines are other answers to the same question."""
    from ruamel.yaml import YAML

    reader = YAML(typ="safe", pure=True)
    files = sorted(raw.glob("*.yml"))
    conversations = [
        lines for file in files for lines in reader.load(file.read_text(encoding="utf-8"))["conversations"]
    ]
    _write_answers(out, ((str(lines[0]), str(lines[1])) for lines in conversations if len(lines) >= 2))


def convert_mnist(raw: Path, out: Path) -> None:
    import numpy as np

    with gzip.open(_single_file(raw, "*.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    images, labels = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(np.int64)
    np.savez_compressed(out / "images.npz", images=images, labels=labels)


def convert_orange(raw: Path, out: Path) -> None:
    """Orange's .tab: three header lines, then label and text separated by a tab."""
    csv.field_size_limit(10_000_000)
    for path in sorted(raw.glob("*.tab")):
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in list(csv.reader(file, delimiter="\t"))[3:] if len(row) > 1 and row[0]]
        split = "train" if "train" in path.stem else "test"
        _write_jsonl(out / f"{split}.jsonl", ({"text": row[1], "label": row[0]} for row in rows))
