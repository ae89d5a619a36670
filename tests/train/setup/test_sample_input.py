"""The input that is shown is a short one of the data, in the form in which `kitout.load` takes it."""

from __future__ import annotations

from kitout.data.examples.convert import from_instruction, from_label, from_messages, from_summary, from_tokens
from kitout.data.examples.examples import Completion, Example, Text
from kitout.train.setup.sample_input import sample_input, short_example


def shown(example: Example, is_closed: bool = False) -> dict[str, object]:
    return sample_input(example, {"text": "premise", "second": "hypothesis"}, is_closed)


def test_the_first_short_one_is_taken_else_the_start_of_the_shortest() -> None:
    texts = ["x " * 80, "- a list", "fits", "fits too"]
    assert short_example([Text(text=text) for text in texts]) == Text(text="fits")
    longer = [Text(text="word " * 90), Text(text="word " * 70)]
    assert short_example(longer) == longer[1]
    assert short_example([]) is None
    assert short_example([Text(text="  ")]) is None
    assert sample_input(None, {}, False) == {}


def test_each_kind_of_example() -> None:
    assert shown(from_label({"text": "it came", "label": "yes"})) == {"text": "it came"}
    pair = from_label({"text": "it came", "second": "it is here", "label": "yes"})
    assert shown(pair) == {"row": {"premise": "it came", "hypothesis": "it is here"}}
    assert shown(from_tokens({"tokens": ["to", "Rome"], "tags": ["O", "loc"]})) == {"text": "to Rome"}
    assert shown(Completion(prompt="2 + 2 =", completion=" 4")) == {"text": "2 + 2 ="}
    assert shown(Text(text="one two three four five six seven eight")) == {"text": "one two three four five six"}
    assert shown(from_summary({"document": "long", "summary": "s"}), is_closed=True) == {"text": "long"}


def test_chats() -> None:
    question = {"role": "user", "content": "Who?\n\nyou"}
    instruction = from_instruction({"instruction": "Who?", "context": "you", "response": "me"})
    assert shown(instruction) == {"text": "Who?\n\nyou", "messages": [question]}
    assert shown(instruction, is_closed=True) == {"text": "Who?\n\nyou"}
    turns = [
        {"role": "system", "content": "short"}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"}, question, {"role": "assistant", "content": "me"},
    ]  # fmt: skip
    messages = shown(from_messages({"messages": turns}))["messages"]
    assert messages == [turns[0], question]  # the last question alone: an earlier answer is long
