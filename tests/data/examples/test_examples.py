"""What makes two examples the same, and their two sides as text."""

from __future__ import annotations

from kitout.data.examples.convert import one_turn_chat
from kitout.data.examples.examples import Chat, Completion, LabeledText, TaggedWords, Text, Turn


def test_the_exact_key_is_of_the_content_alone() -> None:
    assert Text("a", location="x:1").exact_key == Text("a", location="y:2").exact_key
    different = [Text("a"), Text("A"), Completion("", "a"), LabeledText("a", 1), LabeledText("a", "1")]
    assert len({example.exact_key for example in different}) == 5
    assert one_turn_chat("a", "b").exact_key == one_turn_chat("a", "b").exact_key != one_turn_chat("a", "c").exact_key


def test_the_exact_key_stays_the_same_in_every_version() -> None:
    assert LabeledText("é", ("x", "y"), "b").exact_key == "10934b13455f2e179ea6edb02dd25a27"


def test_near_copies_share_an_input_and_exact_copies_everything() -> None:
    one, other, third = (
        LabeledText("Hello  World", "x"),
        LabeledText("hello world ", "x"),
        LabeledText("hello world", "y"),
    )
    assert one.input_key == other.input_key == third.input_key
    assert len({e.exact_key for e in (one, other, third)}) == 3


def test_words_stand_where_the_text_has_them() -> None:
    words, tags = ("Ada", "is", "!"), ("PER", "O", "O")
    assert TaggedWords(words, tags).located_words() == ("Ada is !", ((0, 3), (4, 6), (7, 8)))
    true = TaggedWords(words, tags, text="Ada  is!", starts=(0, 5, 7))
    assert true.located_words() == ("Ada  is!", ((0, 3), (5, 7), (7, 8)))
    assert true == TaggedWords(words, tags)


def test_both_sides_as_text() -> None:
    chat = one_turn_chat("Q", "A", "S")
    assert (chat.source_text(), chat.answer_text()) == ("S\nQ", "A")
    longer = Chat((*chat.turns, Turn({"role": "user", "content": "R"}), Turn({"role": "assistant", "content": "B"})))
    assert (longer.source_text(), longer.answer_text()) == ("S\nuser: Q\nassistant: A\nuser: R", "B")
    assert Chat(chat.turns[:2]).answer_text() == ""
    assert LabeledText("a", 1.0, "b").source_text() == "a\nb"
    assert [LabeledText("a", label).answer_text() for label in (1.0, 0.5, "x", ("x", "y"))] == ["1", "0.5", "x", "x, y"]
    assert TaggedWords(("a", "b"), ("O", "X")).source_text() == "a b"
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    assert (
        Turn({"role": "assistant", "content": "", "tool_calls": [call]}).text == '{"name": "f", "arguments": {"x": 1}}'
    )
