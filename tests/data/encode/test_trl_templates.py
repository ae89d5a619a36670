"""The mask of every chat template that ships with TRL: what each assistant turn adds to the rendering, or a refusal.

The truth is taken from renderings alone: a trained run begins where a prompt for that turn ends, and is what the
answered turn adds to it. A refusal that names a switch must be right with that switch.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kitout.data.encode.chat_template import ChatTemplate
from kitout.data.encode.generation import CausalEncoder
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.data.encode.spans_to_labels import SpanTokenizer
from kitout.data.examples.examples import Chat, Turn
from kitout.data.read.tables import DataError

_SPEC = importlib.util.find_spec("trl")  # found, not imported: it takes seconds
FOLDER = Path(str(_SPEC.origin)).parent / "chat_templates" if _SPEC is not None else None
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja")) if FOLDER is not None else []

pytestmark = pytest.mark.skipif(FOLDER is None, reason="TRL is not installed: make setup")

SPECIAL = re.compile(
    r"<[|｜][^<>\s{}'\"]{1,40}[|｜]>|<(?:start|end)_of_turn>|<end_of_utterance>|<\|[a-z_]+>|<[a-z_]+\|>"
)
ENDS = ("<|im_end|>", "<|eot_id|>", "<｜end▁of▁sentence｜>", "<end_of_turn>", "<turn|>", "<|return|>", "<|eot|>",
        "<|END_OF_TURN_TOKEN|>", "<end_of_utterance>", "</s>")  # fmt: skip

CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "a city"}}, "required": ["city"]}
TOOLS = ({"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": CITY}},)
RESULT = {"role": "tool", "content": "rain", "name": "weather", "tool_call_id": "call00001"}


def chat(*messages: tuple[str, str] | dict[str, Any], tools: Sequence[Any] = ()) -> Chat:
    as_dicts = [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in messages]
    return Chat(tuple(map(Turn, as_dicts)), tuple(tools))


def answer(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


CHATS = {
    "one": chat(("user", "first"), answer("one")),
    "several": chat(("system", "be brief"), ("user", "first"), answer("one"), ("user", "second"), answer("two"),
                    ("user", "third"), answer("three")),
    "reasoning": chat(("user", "first"), answer("one", reasoning_content="because"), ("user", "second"),
                      answer("two", reasoning_content="likewise")),
    "tags": chat(("user", "first"), answer("<think>\nbecause\n</think>\n\none"), ("user", "second"),
                 answer("<think>\nlikewise\n</think>\n\ntwo")),
    "mixed": chat(("user", "first"), answer("one", reasoning_content="because"), ("user", "second"), answer("two")),
    "tools": chat(("user", "first"), answer("", tool_calls=[CALL]), RESULT, answer("two"), tools=TOOLS),
    "more": chat(("system", "be brief"), ("user", "first"), answer("one", tool_calls=[CALL]), RESULT, answer("two"),
                 ("user", "second"), answer("three"), tools=TOOLS),
}  # fmt: skip
REFUSED = r"leaves out|refuses|the chat template fails|training would not match generation"
SWITCH = re.compile(r"pass (\w+)=(True|False) to it")


@cache
def tokenizer(name: str) -> Any:
    """A tokenizer of single bytes with the special tokens that the template writes."""
    assert FOLDER is not None
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    end = next((token for token in ENDS if token in source), "<|endoftext|>")
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token=end, pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": sorted(set(SPECIAL.findall(source)) - {end})})
    fast.chat_template = source
    return fast


def trained_spans(tok: Any, item: EncodedExample) -> tuple[str, list[tuple[int, int]]]:
    """The text of an example and the characters that are trained on. Bytes and special tokens decode one by one."""
    text, spans = "", []
    for token, label in zip(item.input_ids, item.labels, strict=True):
        piece = tok.decode([token])
        if label != IGNORE_INDEX and spans and spans[-1][1] == len(text):
            spans[-1] = (spans[-1][0], len(text) + len(piece))
        elif label != IGNORE_INDEX:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return text, spans


def check_masks(tok: Any, example: Chat, options: dict[str, Any]) -> None:
    items = CausalEncoder(tok, 4096, template_kwargs=options)([example])
    template = ChatTemplate(SpanTokenizer(tok), options)
    turns, tools = template.fit_turns(example)
    ends = re.compile(f"({'|'.join(map(re.escape, tok.all_special_tokens))}|\\s)*")
    is_tagged = "generation" in re.findall(r"{%-?\s*(\w+)", tok.chat_template)
    asked = {k: template.render(turns[:k], tools, True) for k, turn in enumerate(turns) if turn.role == "assistant"}
    answered = {k: template.render(turns[: k + 1], tools) for k in asked}
    found = []
    for item in items:
        text, spans = trained_spans(tok, item)
        for start, end in spans:
            # the turn that this run is an answer to: the last one that the model is asked for with what precedes it
            k = max(k for k, prompt in asked.items() if text.startswith(prompt) and len(prompt) <= start)
            assert answered[k].startswith(asked[k])
            found.append(k)
            prompt, added = asked[k], answered[k][len(asked[k]) :]
            if start > len(prompt):
                assert is_tagged, "only the template's own tags may leave out the start of a turn"
            run, rest = text[start:end], added[start - len(prompt) :]
            same = len(run) if rest.startswith(run) else len(rest.rstrip())
            assert run[:same] == rest[:same]
            assert ends.fullmatch(run[same:])  # an end token that the template does not write
            assert ends.fullmatch(rest[same:])  # or one that is only there while the turn is the last
            assert any(run.endswith(token) for token in tok.all_special_tokens)
            assert turns[k].message["content"].split("\n")[-1] in run or turns[k].message.get("tool_calls")
            assert "Ulm" in run or not turns[k].message.get("tool_calls")
    assert sorted(found) == list(asked), "every assistant turn is trained on once"


def refusal(tok: Any, example: Chat, options: dict[str, Any]) -> str:
    try:
        check_masks(tok, example, options)
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", NAMES)
def test_the_mask_is_what_each_turn_adds_or_refused(name: str) -> None:
    tok = tokenizer(name)
    right = set()
    for kind, example in CHATS.items():
        message = refusal(tok, example, {})
        switch = SWITCH.search(message)
        if switch is not None:
            message = refusal(tok, example, {switch[1]: switch[2] == "True"})
            assert not message, "the switch that is named makes it right"
        assert not message or re.search(REFUSED, message), message
        if not message:
            right.add(kind)
    if not name.startswith("deepseek"):  # their prompt opens a reasoning block that an answer does not have
        assert {"one", "several"} <= right
    if name.endswith(("r1_distill_training", "qwen3", "glm4moe", "3_ultra")):
        assert "tags" in right


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_beside_its_calls_is_rendered_or_refused(name: str) -> None:
    """Llama 3.1 and 3.2 and Muse Glimmer write the calls alone."""
    example = chat(("user", "first"), answer("ponderous", tool_calls=[CALL]), RESULT, answer("two"), tools=TOOLS)
    encoder, message, text = CausalEncoder(tokenizer(name), 8192), "", ""
    try:
        text = "".join(tokenizer(name).decode(item.input_ids) for item in encoder([example]))
    except DataError as error:
        message = str(error)
    assert re.search(REFUSED, message) or all(word in text for word in ("ponderous", "Ulm", "rain"))
    if name.startswith(("llama3_1", "llama3_2", "muse_glimmer")):
        assert "leaves out 'content' of turn 2" in message


def test_the_templates_are_there() -> None:
    assert len(NAMES) >= 40
