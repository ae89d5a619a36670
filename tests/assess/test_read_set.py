"""How a source is read as a set: its columns, split and groups; what a model cannot be asked is said beforehand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kitout
from kitout.assess.example_set import ExampleSet
from kitout.assess.read_set import SetReader
from kitout.errors import ConfigError, DataError
from kitout.evaluate.sets.choice_set import ChoiceSet
from kitout.evaluate.sets.text_set import TextSet
from kitout.files.usage_record import BaseRecord, TextRecord, UsageRecord
from kitout.train.config.schema import SourceConfig
from tiny_models import jsonl, reviews
from tiny_models import tokenizer as tiny_tokenizer
from zoo import ZOO

QUESTIONS = [{"question": f"q {i}?", "choices": ["good", "bad"], "answer": i % 2} for i in range(6)]


def reader(species: str = "llama", usage: UsageRecord | None = None) -> SetReader:
    writes = species in ("llama", "t5")
    return SetReader(kitout.attach(ZOO[species].build()), tiny_tokenizer(), usage, writes)


def usage(task: str, labels: Any = (), **text: Any) -> UsageRecord:
    record = TextRecord(tokenizer="x", max_length=64, **text)
    return UsageRecord(task=task, labels=list(labels), base=BaseRecord(name="b", source="folder"), text=record)


def read(where: SetReader, path: Path | str, group: str | None = None, **options: Any) -> Any:
    return where.read(SourceConfig(path=str(path), **options), group)


def test_columns_of_questions_are_renamed_and_a_csv_holds_choices_as_json(tmp_path: Path) -> None:
    renamed = [{"q": row["question"], "options": row["choices"], "gold": row["answer"]} for row in QUESTIONS]
    plain = read(reader(), jsonl(tmp_path / "a.jsonl", QUESTIONS))
    columns = {"question": "q", "choices": "options", "answer": "gold"}
    of_renamed = read(reader(), jsonl(tmp_path / "b.jsonl", renamed), columns=columns)
    with (tmp_path / "c.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "choices", "answer"])
        writer.writerows([row["question"], json.dumps(row["choices"]), row["answer"]] for row in QUESTIONS)
    of_csv = read(reader(), tmp_path / "c.csv")
    assert isinstance(plain, ChoiceSet)
    assert plain.questions == of_renamed.questions == of_csv.questions
    assert len(read(reader(), f"{tmp_path / 'a.jsonl'}#2")) == 2
    assert len(read(reader(), f"{tmp_path / 'a.jsonl'}#1:4", limit=2)) == 2
    with pytest.raises(ConfigError, match="'answers' is no column of questions with choices; did you mean 'answer'"):
        read(reader(), tmp_path / "b.jsonl", columns=columns | {"answers": "gold"})
    with pytest.raises(ConfigError, match=r"no column 'optoins'.*did you mean 'options'"):
        read(reader(), tmp_path / "b.jsonl", format="choice", columns=columns | {"choices": "optoins"})


def test_only_the_split_that_is_measured_is_read(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", [{"text": ""}, {"nothing": 1}])
    jsonl(tmp_path / "validation.jsonl", [{"text": "of validation"}])
    assert read(reader(), tmp_path).texts == ("of validation",)
    jsonl(tmp_path / "test.jsonl", [{"text": "of test"}])
    assert read(reader(), tmp_path).texts == ("of test",)


def test_rows_are_read_by_the_columns_that_the_adapter_was_trained_on(tmp_path: Path) -> None:
    rows = [{"tweet": row["text"], "mood": row["label"], "text": "not this"} for row in reviews(6)]
    trained = usage("classification", ["bad", "good"], columns={"text": "tweet", "label": "mood"}, format="label")
    own = read(reader("bert", trained), jsonl(tmp_path / "a.jsonl", rows))
    usual = read(reader("bert", trained), jsonl(tmp_path / "b.jsonl", reviews(6)))
    assert isinstance(own, ExampleSet)
    assert own.kind == "classification"
    assert own.dataset.label_names == ("bad", "good")
    assert [item.input_ids for item in own.dataset.test] == [item.input_ids for item in usual.dataset.test]


@pytest.mark.parametrize(
    ("task", "labels", "rows"),
    [
        ("regression", (), [{"text": f"t {i}", "label": i + 0.5} for i in range(4)]),
        ("multilabel", ("a", "b"), [{"text": f"t {i}", "label": ["a", "b"][: i % 2 + 1]} for i in range(4)]),
        ("token_classification", ("O", "X"), [{"tokens": ["a", "b"], "tags": ["O", "X"]} for _ in range(4)]),
        ("seq2seq_lm", (), [{"prompt": f"p {i}", "completion": f"c {i}"} for i in range(4)]),
    ],
)
def test_every_task_is_read_with_a_baseline_where_there_is_one(
    tmp_path: Path, task: str, labels: tuple[str, ...], rows: list[dict[str, Any]]
) -> None:
    where = reader("t5" if task == "seq2seq_lm" else "bert", usage(task, labels))
    found = read(where, jsonl(tmp_path / "a.jsonl", rows))
    assert (found.kind, len(found)) == (task, 4)
    constant = found.constant()
    assert (constant is None) == (task == "seq2seq_lm")
    if constant is not None:
        assert all(np.isfinite(measure.value) for measure in found.measures(constant[1]).values())


def test_groups_come_from_a_column_and_stay_with_their_rows(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [row | {"passage": i // 2} for i, row in enumerate(QUESTIONS)])
    found = read(reader(), file, "passage")
    assert found.groups == ("0", "0", "1", "1", "2", "2")
    sampled = read(reader(), file, "passage", limit=4)
    assert [f"q {int(g) * 2}?"[:3] for g in sampled.groups] <= [q.question[:3] for q in sampled.questions]
    assert len(sampled.groups) == 4
    texts = read(reader(), jsonl(tmp_path / "t.jsonl", [{"text": f"t {i}", "doc": i} for i in range(3)]), "doc")
    assert isinstance(texts, TextSet)
    assert texts.groups == ("0", "1", "2")
    answers = [[[-1.0, -2.0], [4, 3]]] * 6
    assert all(m.groups is not None for m in found.measures(answers).values())
    with pytest.raises(DataError, match=r"a\.jsonl line 1 has no group: 'pasage'; did you mean 'passage'"):
        read(reader(), file, "pasage")
    file.write_text("\n" + file.read_text())  # lines are those of the file
    with pytest.raises(DataError, match=r"a\.jsonl line 2 has no group"):
        read(reader(), file, "pasage")
    bad = jsonl(tmp_path / "b.jsonl", [QUESTIONS[0], QUESTIONS[0] | {"answer": 7}])
    with pytest.raises(ConfigError, match=r"b\.jsonl line 2 has the answer 7"):
        read(reader(), bad)
    one = jsonl(tmp_path / "one.jsonl", [row | {"passage": 1} for row in QUESTIONS])
    with pytest.raises(DataError, match="at least two groups"):
        read(reader(), one, "passage")


def test_what_the_model_cannot_be_asked_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    choices = jsonl(tmp_path / "c.jsonl", QUESTIONS)
    texts = jsonl(tmp_path / "t.jsonl", [{"text": "a"}])
    labeled = jsonl(tmp_path / "l.jsonl", reviews(4))
    for named in ({"format": "choice"}, {}):
        with pytest.raises(ConfigError, match="scored by a language model"):
            read(reader("bert", usage("classification", ["a", "b"])), choices, **named)
    as_trained = usage("classification", ["0", "1"], format="label", columns={"text": "question", "label": "answer"})
    assert read(reader("bert", as_trained), choices).kind == "classification"
    with pytest.raises(ConfigError, match="no likelihood under an encoder-decoder"):
        read(reader("t5"), texts)
    with pytest.raises(ConfigError, match="the model answers with text; with a system_prompt"):
        read(reader(), labeled)
    assert read(reader(), labeled, system_prompt="good or bad?").kind == "causal_lm"
    with pytest.raises(DataError, match="label 'good' is not in the set"):
        read(reader("bert", usage("classification", ["x", "y"])), labeled)
    for empty in ("", "\n\n"):
        (tmp_path / "e.jsonl").write_text(empty)
        with pytest.raises(DataError, match="has no rows"):
            read(reader(), tmp_path / "e.jsonl")


def test_a_column_of_groups_that_the_format_reads_is_read_all_the_same(tmp_path: Path) -> None:
    rows = [{"context": f"cat {i // 2}", "question": f"q{i}?", "answer": "good" if i % 2 else "bad"} for i in range(8)]
    where, path = reader(), jsonl(tmp_path / "a.jsonl", rows)
    plain, grouped = read(where, path), read(where, path, "context")
    assert isinstance(grouped, ExampleSet)
    assert grouped.digest == plain.digest, "the prompts have the context"
    assert (plain.groups, grouped.groups) == ((), tuple(f"cat {i // 2}" for i in range(8)))
