"""What makes two examples the same, and their two sides as text."""

from __future__ import annotations

from kitout.data.examples.convert import single
from kitout.data.examples.examples import Chat, Completion, Labelled, Tagged, Text, Turn


def test_the_key_is_of_the_content_alone() -> None:
    assert Text("a", place="x:1").exact_key == Text("a", place="y:2").exact_key
    different = [Text("a"), Text("A"), Completion("", "a"), Labelled("a", 1), Labelled("a", "1")]
    assert len({example.exact_key for example in different}) == 5
    assert single("a", "b").exact_key == single("a", "b").exact_key != single("a", "c").exact_key


def test_the_key_stays_the_same_in_every_version() -> None:
    assert Labelled("é", ("x", "y"), "b").exact_key == "8c4b1319710f229071c276b4e661b3fd"


def test_input_key_and_content_key() -> None:
    one, other, third = Labelled("Hello  World", "x"), Labelled("hello world ", "x"), Labelled("hello world", "y")
    assert one.input_key == other.input_key == third.input_key
    assert one.content_key == other.content_key != third.content_key


def test_both_sides_as_text() -> None:
    chat = single("Q", "A", "S")
    assert (chat.source_text(), chat.answer_text()) == ("S\nQ", "A")
    longer = Chat((*chat.turns, Turn({"role": "user", "content": "R"}), Turn({"role": "assistant", "content": "B"})))
    assert (longer.source_text(), longer.answer_text()) == ("S\nuser: Q\nassistant: A\nuser: R", "B")
    assert Chat(chat.turns[:2]).answer_text() == ""
    assert Labelled("a", 1.0, "b").source_text() == "a\nb"
    assert [Labelled("a", label).answer_text() for label in (1.0, 0.5, "x", ("x", "y"))] == ["1", "0.5", "x", "x, y"]
    assert Tagged(("a", "b"), ("O", "X")).source_text() == "a b"
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    assert (
        Turn({"role": "assistant", "content": "", "tool_calls": [call]}).text == '{"name": "f", "arguments": {"x": 1}}'
    )
