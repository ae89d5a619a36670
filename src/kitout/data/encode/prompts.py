"""What a model is asked: the token ids of a prompt, as the examples of a causal model begin before their answer.

A chat goes through the tokenizer's template with its generation prompt, raw text gets the tokenizer's own start tokens.
What the template cannot render is refused as in training. It knows no answer, no length and no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from kitout.data.encode.assistant_spans import AssistantSpans
from kitout.data.encode.spans_to_labels import SpannedText, SpanTokenizer
from kitout.data.examples.examples import Chat
from kitout.data.read.tables import DataError


class PromptEncoder:
    """Prompts by a tokenizer. template_kwargs: for the chat template, such as {"enable_thinking": False}."""

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> None:
        self.span_tokenizer = SpanTokenizer(tokenizer)
        self.spans = AssistantSpans(self.span_tokenizer, template_kwargs=template_kwargs)

    @cached_property
    def turn_end_ids(self) -> tuple[int, ...]:
        """The special tokens that the chat template writes after an answer, which end it where it is generated."""
        written = self.spans.template.end_tokens_of_turn if self.spans.template.exists else ()
        return tuple(int(self.span_tokenizer.tokenizer.convert_tokens_to_ids(token)) for token in written)

    def encode_chat(self, chat: Chat) -> tuple[int, ...]:
        """Of the turns so far; the assistant is to answer the last one."""
        if not chat.turns or chat.turns[-1].role == "assistant":
            raise DataError("the chat ends with an assistant turn: end it with what is to be answered")
        template = self.spans.template
        if not template.exists:
            if [turn.role for turn in chat.turns if turn.role != "system"] != ["user"] or chat.tools:
                raise DataError(
                    "the tokenizer has no chat template, so it is asked one question at a time: give one user turn"
                )
            return self.encode_text("".join(f"{turn.text}\n" for turn in chat.turns if turn.text))
        coverage = self.spans.coverage
        turns, tools = template.fit_turns(replace(chat, turns=coverage.order_results(chat.turns)))
        coverage.check(turns, tools)
        text = template.render(template.without_end_tokens(turns), tools, add_generation_prompt=True)
        return self._ids(SpannedText(text, ()))

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Of raw text that is continued."""
        return self._ids(SpannedText(text, (), add_start_token=True))

    def _ids(self, spanned: SpannedText) -> tuple[int, ...]:
        (example,) = self.span_tokenizer.encode([spanned])
        return example.input_ids
