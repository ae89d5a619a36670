"""Pairs, judged answers and prompts are read as TRL's data sets have them, and other tables as they were before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kitout.data.examples.alignment_hint import refuse_for_training
from kitout.data.examples.convert import one_turn_chat
from kitout.data.examples.examples import Chat, Completion
from kitout.data.examples.format_table import FORMATS
from kitout.data.examples.formats import detect, to_examples
from kitout.data.examples.preferences import PreferencePair, Prompt, UnpairedAnswer, unpair
from kitout.data.read.sources import load_examples
from kitout.data.split import split_examples
from kitout.errors import DataError, UnusableFormat

KINDS = {"preference": PreferencePair, "unpaired": UnpairedAnswer, "prompts": Prompt}


def read(row: dict[str, Any], *kinds: str, **options: Any) -> Any:
    (example,) = to_examples([(1, row)], "x.jsonl", kinds=kinds or None, **options)
    return example


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def turns(chat: Chat | Completion) -> list[tuple[str, str]]:
    assert isinstance(chat, Chat)
    return [(turn.role, turn.text) for turn in chat.turns]


TALK = [user("Hi"), bot("x"), user("y")]
PAIR = {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go."}
AS_TEXTS = [("user", "Hi"), ("assistant", "Hello.")]
CHOSEN = [
    (PAIR, AS_TEXTS),
    ({"question": "Hi", "chosen": " Hello. ", "rejected": "Go."}, [("user", "Hi"), ("assistant", " Hello.")]),
    (PAIR | {"system": "Be kind"}, [("system", "Be kind"), *AS_TEXTS]),
    (PAIR | {"prompt": "Add", "input": "1 1"}, [("user", "Add\n\n1 1"), ("assistant", "Hello.")]),
    ({"prompt": [user("Hi")], "chosen": [bot("Hello.")], "rejected": [bot("Go.")]}, AS_TEXTS),
    ({"prompt": [user("Hi")], "chosen": "Hello.", "rejected": "Go."}, AS_TEXTS),
    ({"chosen": [user("Hi"), bot("Hello.")], "rejected": [user("Hi"), bot("Go.")]}, AS_TEXTS),
    ({"prompt": "Hi", "chosen": [user("Hi"), bot("Hello.")], "rejected": [user("Hi"), bot("Go.")]}, AS_TEXTS),
    ({"prompt": [user("Hi")], "chosen": [user("Hi"), bot("Hello.")], "rejected": [user("Hi"), bot("Go.")]}, AS_TEXTS),
    ({"chosen": json.dumps([user("Hi"), bot("Hello.")]), "rejected": json.dumps([user("Hi"), bot("Go.")])}, AS_TEXTS),
    (
        {"chosen": [*TALK, bot("z")], "rejected": [*TALK, bot("w")]},
        [("user", "Hi"), ("assistant", "x"), ("user", "y"), ("assistant", "z")],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), CHOSEN)
def test_pairs_are_detected_and_hold_their_prompt(row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    for kinds in ((), ("preference",)):
        pair = read(row, *kinds)
        assert isinstance(pair, PreferencePair)
        assert turns(pair.chosen) == expected
        assert turns(pair.rejected)[:-1] == expected[:-1]
        assert turns(pair.rejected) != expected
    assert pair.answer_text() == expected[-1][1]


def test_one_beginning_is_the_prompt_that_trl_extracts() -> None:
    from trl.data_utils import extract_prompt

    rows = [
        {"chosen": [user("a"), bot("b"), user("c"), bot("d")], "rejected": [user("a"), bot("b"), user("c"), bot("e")]},
        {"chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]},
    ]
    for row in rows:
        prompt = extract_prompt(row)["prompt"]
        chosen = read(row).chosen
        assert [dict(turn.message) for turn in chosen.turns[: len(prompt)]] == prompt
    for text in ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, {"chosen": "it", "rejected": "is"}):
        theirs = extract_prompt(text)
        pair = read(text, format="raw_preference")
        assert (pair.chosen, pair.rejected) == (
            Completion(theirs["prompt"], theirs["chosen"]), Completion(theirs["prompt"], theirs["rejected"])
        )  # fmt: skip


def test_an_answer_of_several_turns_is_trained_on_as_a_whole() -> None:
    call, other = [user("a"), bot("b"), user("c"), bot("d")], [user("a"), bot("x"), user("c"), bot("y")]
    pair = read({"chosen": call, "rejected": other})
    assert [turn.train_on for turn in pair.chosen.turns] == [None, True, None, True]
    assert (pair.source_text(), pair.answer_text()) == ("a", "assistant: b\nuser: c\nassistant: d")


def test_margins() -> None:
    margins = [(None, 0.0), ("", 0.0), (float("nan"), 0.0), (2, 2.0), ("1.5", 1.5)]
    assert [read(PAIR | {"margin": value}).margin for value, _ in margins] == [margin for _, margin in margins]
    for value in ("much", True, "inf", [1]):
        with pytest.raises(DataError, match=r"line 1: 'margin' is .*, expected a number"):
            read(PAIR | {"margin": value})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": " b "}, "line 1: the chosen and the rejected answer are equal"),
        ({"chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("b")]}, "are equal"),
        (
            {"chosen": "b", "rejected": "c"},
            r"there is no prompt: name its column \(columns.prompt\).* write data.train.format=raw_preference",
        ),
        ({"chosen": [bot("b")], "rejected": [bot("c")]}, "messages that begin with it$"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "there is no prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "'rejected' is empty, expected text"),
        ({"chosen": [user("a"), bot("b")], "rejected": [user("c"), bot("d")]}, "have no common beginning"),
        ({"chosen": [user("a"), bot("b")], "rejected": [user("a"), user("c")]}, "'rejected' begins with a user turn"),
        ({"chosen": [user("a"), bot("b"), user("c")], "rejected": [user("a"), bot("d")]}, "'chosen' ends with a user"),
        ({"chosen": [user("a")], "rejected": [user("a"), bot("d")]}, "'chosen' has no answer"),
        ({"prompt": "a", "chosen": [bot("b")], "rejected": [user("a"), bot("d")]}, "differ in kind"),
        ({"prompt": [user("z")], "chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("d")]}, "do not begin"),
        ({"prompt": "a", "chosen": "[{'role': 'assistant', 'content': 'b'}]", "rejected": "c"}, "chosen: not JSON"),
    ],
)
def test_errors_of_pairs(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(row)


def test_a_prompt_of_another_text_is_remarked() -> None:
    row = {"prompt": "z", "chosen": [user("Hi"), bot("a")], "rejected": [user("Hi"), bot("b")]}
    assert "column of the prompt is not read" in read(row).remarks[0]


def test_raw_formats_keep_every_character() -> None:
    row = {"prompt": "a ", "chosen": " b\n", "rejected": "c"}
    pair = read(row, format="raw_preference")
    assert (pair.chosen, pair.rejected) == (Completion("a ", " b\n"), Completion("a ", "c"))
    answer = read({"prompt": " a", "completion": "b ", "label": 1}, format="raw_unpaired")
    assert answer.answer == Completion(" a", "b ")
    assert read({"prompt": " a ", "n": 1}, format="raw_prompts").prompt == " a "
    with pytest.raises(DataError, match="messages are read without raw_"):
        read({"prompt": "a", "chosen": [bot("b")], "rejected": "c"}, format="raw_preference")
    with pytest.raises(DataError, match="one is the beginning of the other"):
        read({"chosen": "ab", "rejected": "a"}, format="raw_preference")


@pytest.mark.parametrize(
    ("label", "expected"),
    [(True, True), (False, False), (1, True), (0.0, False), ("1", True), ("0.0", False), ("TRUE", True), ("no", False),
     ("thumbs_up", True), (" Bad ", False), ("desirable", True), ("rejected", False)],
)  # fmt: skip
def test_labels_of_judged_answers(label: Any, expected: bool) -> None:
    answer = read({"prompt": "Hi", "completion": "Hello.", "label": label}, "unpaired")
    assert isinstance(answer, UnpairedAnswer)
    assert answer.is_desirable is expected
    assert turns(answer.answer) == AS_TEXTS


@pytest.mark.parametrize("label", [None, "", 2, -1, 0.5, "perhaps", [1]])
def test_other_labels_are_errors(label: Any) -> None:
    with pytest.raises(DataError, match=r"line 1: 'label' is .*expected whether the answer is wanted: true or false"):
        read({"prompt": "Hi", "completion": "Hello.", "label": label}, "unpaired")


def test_judged_answers_of_messages() -> None:
    rows = [{"prompt": [user("Hi")], "completion": [bot("Hello.")], "label": True},
            {"completion": [user("Hi"), bot("Hello.")], "label": True}]  # fmt: skip
    assert [turns(read(row, format="unpaired").answer) for row in rows] == [AS_TEXTS, AS_TEXTS]


PROMPTS = [
    ({"prompt": "Hi", "answer": "4"}, [("user", "Hi")], True),
    ({"instruction": "Add", "input": "1 1", "output": "2"}, [("user", "Add\n\n1 1")], True),
    ({"question": "Q", "context": "C", "answer": "A"}, [("user", "C\n\nQ")], True),
    ({"question": "Q", "choices": ["a", "b"], "answer": 1}, [("user", "Q\nA. a\nB. b")], True),
    ({"prompt": [user("a"), bot("b"), user("c")], "system": "s"},
     [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")], False),
    ({"messages": [user("a"), bot("b")], "meta": {"k": [1]}}, [("user", "a")], False),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, [("user", "a")], True),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected", "is_text"), PROMPTS)
def test_prompts_keep_all_columns(row: dict[str, Any], expected: list[tuple[str, str]], is_text: bool) -> None:
    for options in ({"kinds": ("prompts",)}, {"format": "prompts"}):
        (prompt,) = to_examples([(7, row)], "x.jsonl", **options)
        assert isinstance(prompt, Prompt)
        assert prompt.row == row
        assert prompt.is_text == is_text
        assert turns(prompt.prompt) == expected
        assert prompt.location == "x.jsonl:7"
    assert bool(prompt.remarks) == ("messages" in row)
    assert prompt.answer_text() == ""


def test_a_prompt_is_asked_as_the_same_row_is_trained_on() -> None:
    rows = [{"instruction": "Add", "input": "1 1", "output": "2"}, {"question": "Q", "context": "C", "answer": "A"},
            {"question": "Q", "choices": ["a", "b"], "answer": "b"}, {"messages": [user("a"), bot("b")]}]  # fmt: skip
    for row in rows:
        assert read(row, "prompts").input_key == read(row).input_key


def test_prompts_without_a_question_are_errors() -> None:
    for row in (
        {"prompt": ""},
        {"prompt": None},
        {"prompt": [bot("a")]},
        {"prompt": [{"role": "system", "content": "a"}]},
    ):
        with pytest.raises(DataError, match=r"line 1: .*(no prompt|nothing is asked)"):
            read(row, "prompts")


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "a", "completion": "b", "label": True}, "completion"),
        ({"prompt": "a", "response": "b", "label": 1}, "instruction"),
        ({"prompt": "a", "response": "b", "chosen": "c", "rejected": "d"}, "instruction"),
        ({"prompt": "a", "messages": [user("a")], "chosen": [bot("c")], "rejected": [bot("d")]}, "messages"),
        ({"question": "a", "answer": "b"}, "question"),
        ({"text": "a", "label": 1, "chosen": "b", "rejected": "c"}, "label"),
    ],
)
def test_tables_that_had_another_format_keep_it(row: dict[str, Any], name: str) -> None:
    assert detect([(1, row)], "x").format.name == name
    assert detect([(1, row)], "x", kinds=("training",)).format.name == name


def test_a_caller_gets_the_kind_it_wants_or_an_error() -> None:
    row = {"prompt": "a", "messages": [user("a"), bot("b")], "chosen": [user("a"), bot("c")],
           "rejected": [user("a"), bot("d")], "completion": "e", "label": 0}  # fmt: skip
    for kind, example in KINDS.items():
        assert isinstance(read(row, kind), example)
    assert detect([(1, row)], "x", kinds=("prompts",)).columns == {"prompt": "prompt"}
    with pytest.raises(DataError, match=r"(?s)do not fit the format preference; .*format=preference .*columns.chosen="):
        read({"a": "one two", "b": "two three", "c": "three four"}, "preference")
    with pytest.raises(UnusableFormat, match=r"x has texts to train on .*needed are pairs of a chosen and a rejected"):
        detect([(1, {"instruction": "a", "output": "b"})], "x", "instruction", kinds=("preference",))
    assert {each.kind for each in FORMATS.values()} == {"training", *KINDS}


TEXT_PAIR = "data.train.format=instruction data.train.columns.instruction=prompt data.train.columns.response=chosen"


@pytest.mark.parametrize(
    ("row", "options", "stage", "line"),
    [
        (PAIR, {}, "dpo", TEXT_PAIR),
        ({"chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]}, {}, "dpo",
         "data.train.format=messages data.train.columns.messages=chosen"),
        ({"prompt": [user("a")], "chosen": [bot("b")], "rejected": [bot("c")]}, {}, "dpo",
         "data.train.format=completion data.train.columns.prompt=prompt data.train.columns.completion=chosen"),
        ({"q t": "a", "chosen": "b", "rejected": "c"}, {"columns": {"prompt": "q t"}}, "dpo",
         "'data.train.columns.instruction=q t'"),
        ({"prompt": "a", "completion": "b", "label": 1}, {"format": "unpaired"}, "kto",
         "data.train.format=instruction data.train.columns.instruction=prompt data.train.columns.response=completion"),
        ({"prompt": "a"}, {"format": "prompts"}, "grpo", "--reward"),
    ],
)  # fmt: skip
def test_plain_training_names_the_line_to_write(
    row: dict[str, Any], options: dict[str, Any], stage: str, line: str
) -> None:
    with pytest.raises(UnusableFormat) as error:
        detect([(1, row)], "p.jsonl", kinds=("training",), **options)
    message = str(refuse_for_training(error.value, "data/p.jsonl"))
    assert f"kitout align {stage} --model M --data data/p.jsonl" in message
    assert "--out DIR" in message
    assert line in message
    if line.startswith("data."):  # the settings it names read the table
        settings = dict(one.split("=") for one in line.split())
        columns = {name.rpartition(".")[2]: c for name, c in settings.items() if ".columns." in name}
        assert (
            read(row, "training", format=settings["data.train.format"], columns=columns).answer_text() == "Hello."
            or row != PAIR
        )


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        (PAIR, {}, ("instruction", {"instruction": "prompt"})),
        ({"chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]}, {}, ("messages", {})),
        (PAIR, {"format": "raw_preference"}, ("completion", {"prompt": "prompt"})),
        ({"question": "a", "body": "b", "answer": "c"}, {"format": "prompts"},
         ("question", {"question": "question", "context": "body"})),
        ({"prompt": "a", "output": "b"}, {}, ("instruction", {"instruction": "prompt", "response": "output"})),
    ],
)  # fmt: skip
def test_a_model_is_asked_as_its_prompts_are_put(row: dict[str, Any], options: dict[str, Any], expected: Any) -> None:
    assert detect([(1, row)], "x", **options).as_asked() == expected


def test_keys_and_splits_go_by_the_prompt() -> None:
    rows = [{"prompt": f"Say {i // 4}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(200)]
    pairs = to_examples(list(enumerate(rows, 1)), "x")
    assert len({pair.exact_key for pair in pairs}) == 200
    again = to_examples([(9, rows[0])], "elsewhere")[0]
    assert again.exact_key == pairs[0].exact_key
    splits = split_examples({"": [*pairs, again]}, 0.1, 0.2)
    assert splits.num_duplicates == 1
    assert splits.majority_accuracy is None
    prompts = [{pair.input_key for pair in split} for split in (splits.train, splits.validation, splits.test)]
    assert all(prompts)
    assert not prompts[0] & prompts[1] | prompts[0] & prompts[2] | prompts[1] & prompts[2]
    shouted = [to_examples([(1, {"prompt": "SAY  1", "chosen": "x", "rejected": "y"})], "t")[0]]
    assert split_examples({"train": pairs, "test": shouted}, 0, 0).num_leaks == 4


def test_judged_answers_keep_their_proportion_and_few_answers_are_no_labels() -> None:
    answers = unpair(PreferencePair(one_turn_chat(f"q{i}", "yes"), one_turn_chat(f"q{i}", "no")) for i in range(60))
    assert [answer.is_desirable for answer in answers[:2]] == [True, False]
    answers = [answer for i, answer in enumerate(answers) if answer.is_desirable or i % 4 == 1]
    splits = split_examples({"": answers}, 0.1, 0.2)
    assert splits.majority_accuracy is None
    assert any(not answer.is_desirable for answer in splits.test)


def test_bad_pairs_can_be_left_out_and_system_prompts_are_set(tmp_path: Path) -> None:
    rows = [PAIR, PAIR | {"rejected": "Hello."}, PAIR | {"prompt": "Ho"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = load_examples(tmp_path / "p.jsonl", skip_bad_rows=True, system_prompt="Be kind")
    assert [turns(pair.rejected)[0] for pair in loaded.splits[""] if isinstance(pair, PreferencePair)] == [
        ("system", "Be kind")
    ] * 2
    assert "p.jsonl line 2: the chosen and the rejected answer are equal" in loaded.skipped[0]
    with pytest.raises(DataError, match=r"p\.jsonl \(read as preference\): line 2: the chosen"):
        load_examples(tmp_path / "p.jsonl", kinds=("preference",))
    with pytest.raises(UnusableFormat):  # whatever else is wrong with its rows
        load_examples(tmp_path / "p.jsonl", kinds=("training",))


def test_prompts_and_judged_answers_take_a_system_prompt() -> None:
    prompt = read({"prompt": "Hi", "n": 1}, "prompts", system_prompt="Be kind")
    assert turns(prompt.prompt)[0] == ("system", "Be kind")
    assert prompt.row == {"prompt": "Hi", "n": 1}
    answer = read({"prompt": "Hi", "completion": "a", "label": 1}, "unpaired", system_prompt="Be kind")
    assert turns(answer.answer)[0] == ("system", "Be kind")
