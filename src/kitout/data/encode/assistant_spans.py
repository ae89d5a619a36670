"""Which characters of a rendered chat are trained on: those each assistant turn adds, its end token included.

What a turn adds is what the template renders up to it, less what it renders before it; nothing is searched in the
text. A turn that the template renders differently once other turns follow (templates that strip earlier reasoning, or
close only the last turn) becomes an example of its own that ends with it. It knows no token ids, no lengths, no files.
Kept by hand: transformers' mask of assistant tokens needs `{% generation %}`, which most templates lack.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from kitout.data.encode.chat_template import ChatTemplate, Tools
from kitout.data.encode.spans_to_labels import SpannedText, SpanTokenizer
from kitout.data.encode.template_coverage import TemplateCoverage, check_without_template
from kitout.data.examples.examples import Chat, Turn
from kitout.data.examples.turns import REASONING_KEYS
from kitout.data.read.tables import DataError
from kitout.errors import suggest
from kitout.format import common_prefix_length

TRAIN_ON = ("assistant", "last", "all")
SPOKEN_TEXTS = ("content", *REASONING_KEYS)
LOST_LATER = "the chat template drops a part of earlier answers, which train_on=all does not train on (assistant does)"


@dataclass(frozen=True)
class RenderedChat:
    """A chat as its template renders it, and where each turn stands in that text."""

    template: ChatTemplate
    turns: Sequence[Turn]
    tools: Tools

    @cached_property
    def text(self) -> str:
        """All turns, without a generation prompt."""
        return self.template.render(self.turns, self.tools)

    def span_of_turn(self, k: int) -> tuple[int, int] | None:
        """Characters of `text` that turn k adds, its end token included.

        None if the template renders it differently here than when it was the last turn.
        """
        if k == 0:
            return None  # nothing asks for it
        prompt = self.template.render(self.turns[:k], self.tools, add_generation_prompt=True)
        as_last = self.template.render(self.turns[: k + 1], self.tools)
        if not as_last.startswith(prompt) or not self.text.startswith(prompt):
            return None
        end = common_prefix_length(self.text, as_last)
        for token in self.template.end_tokens.finditer(as_last, len(prompt)):
            if token.start() < end < token.end():  # half an end token is none
                end = token.start()
        if self.template.end_tokens.sub("", as_last[end:]).strip():
            return None  # more than end tokens and white space differs
        added = self.text[len(prompt) : end]
        if self.template.ends_with_end_token(added):
            return len(prompt), len(prompt) + len(added.rstrip())  # white space between turns is nobody's answer
        if self.template.ends_with_end_token(as_last[len(prompt) :]):
            return None
        return len(prompt), end


class AssistantSpans:
    """Chats as texts with the spans that are trained on.

    train_on: every "assistant" turn, the "last" of them, or "all" of the text. Without a chat template, single
    exchanges are joined by line breaks.
    """

    def __init__(
        self,
        span_tokenizer: SpanTokenizer,
        train_on: str = "assistant",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if train_on not in TRAIN_ON:
            raise DataError(f"train_on is {train_on!r}; {suggest(train_on, TRAIN_ON)}")
        self.train_on = train_on
        self.template = ChatTemplate(span_tokenizer, template_kwargs)
        self.coverage = TemplateCoverage(self.template)

    def find(self, chat: Chat) -> list[SpannedText]:
        """The chat as one text, or as several if the template renders earlier turns differently later."""
        train_turns = self._turns_to_train(chat)
        if not self.template.exists:
            return [self._join_lines(chat)]
        turns, tools = self.template.fit_turns(replace(chat, turns=self.coverage.order_results(chat.turns)))
        remarks = self.coverage.check(turns, tools)
        turns = self.template.without_end_tokens(turns)
        train_turns = [k + len(turns) - len(chat.turns) for k in train_turns]  # a merged system turn moves all others
        if self.train_on == "all":
            whole = self._whole_chat(RenderedChat(self.template, turns, tools), train_turns, chat.location)
            said = Counter(str(turns[k].message.get(key) or "").strip() for k in train_turns for key in SPOKEN_TEXTS)
            lost = (LOST_LATER,) if any(whole.text.count(text) < times for text, times in said.items() if text) else ()
            return [replace(whole, remarks=remarks + lost)]
        texts: list[SpannedText] = []
        while train_turns:
            prefix = RenderedChat(self.template, turns[: train_turns[-1] + 1], tools)
            text, train_turns = self._last_turn_and_those_that_agree(prefix, train_turns, chat.location, turns)
            texts.append(replace(text, remarks=remarks))
        return texts[::-1]

    def _turns_to_train(self, chat: Chat) -> list[int]:
        """The turns to train on: a flag of the data goes before `train_on`."""
        spoken = [k for k, turn in enumerate(chat.turns) if turn.role == "assistant"]
        for k, turn in enumerate(chat.turns):
            if turn.train_on and turn.role != "assistant":
                raise DataError(f"turn {k + 1} ({turn.role}) is flagged to be trained on; only assistant turns can be")
        by_default = [k for k in spoken if self.train_on != "last" or k == spoken[-1]]
        flags = {k: chat.turns[k].train_on for k in spoken}
        selected = [k for k, flag in flags.items() if (flag if flag is not None else k in by_default)]
        if self.train_on == "all":
            return selected
        if not selected:
            raise DataError(
                "no assistant turn is to be trained on" if spoken else "there is no assistant turn to train on"
            )
        if 0 in selected:
            raise DataError(
                "it starts with an assistant turn, which nothing asks for; start with a user turn, or flag that turn "
                '("train": false)'
            )
        return selected

    def _last_turn_and_those_that_agree(
        self, chat: RenderedChat, train_turns: list[int], location: str, all_turns: Sequence[Turn]
    ) -> tuple[SpannedText, list[int]]:
        """The chat with its last turn and every earlier one that is rendered as when it was last; and the others.

        all_turns: of the whole chat, for a message.
        """
        last = train_turns[-1]
        spans = {k: span for k in train_turns if (span := chat.span_of_turn(k)) is not None}
        if last not in spans:
            raise DataError(self.template.inconsistency_message(all_turns, chat.tools, last))
        start, end = spans[last]
        needs_end_token = not self.template.ends_with_end_token(chat.text[start:end])
        if needs_end_token:  # the template closes no turn: each needs the end token that is put after the text
            spans, end = {last: spans[last]}, len(chat.text)
        spanned = SpannedText(
            chat.text[:end],
            self._narrow_to_tags(chat, list(spans.values())),
            start,
            add_end_token=needs_end_token,
            reference=chat.turns[last].text,
            location=location,
        )
        return spanned, [k for k in train_turns if k not in spans]

    def _narrow_to_tags(self, chat: RenderedChat, turn_spans: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        """What the template's own {% generation %} covers of the turns, with the end tokens after it.

        The turns themselves if it has no such tag.
        """
        tagged = self.template.tagged_spans(chat.turns, chat.tools)
        if tagged is None:
            return tuple(turn_spans)
        spans: list[tuple[int, int]] = []
        for start, end in turn_spans:
            inside = [(a, b) for a, b in tagged if a < end and b > start]
            if not inside:
                raise DataError("the template's {% generation %} covers nothing of an assistant turn")
            end_tokens = self.template.end_tokens.finditer(chat.text, inside[-1][1], end)
            close = next((token.start() for token in end_tokens), end)
            runs = [*inside, (close, end)] if close < end else inside
            for a, b in ((max(a, start), min(b, end)) for a, b in runs):
                if spans and a <= spans[-1][1] and spans[-1][1] > start:
                    spans[-1] = (spans[-1][0], max(b, spans[-1][1]))
                else:
                    spans.append((a, b))
        return tuple(spans)

    def _whole_chat(self, chat: RenderedChat, train_turns: list[int], location: str) -> SpannedText:
        """Everything, less the assistant turns that the data flag as not trained on."""
        spans, span_start, answer_start, reference = [], 0, 0, ""
        for k, turn in enumerate(chat.turns):
            if turn.role != "assistant":
                continue
            reference = turn.text
            span = chat.span_of_turn(k)
            if span is not None and k in train_turns:
                answer_start = span[0]
            elif span is not None:
                spans.append((span_start, span[0]))
                span_start = span[1]
            elif k not in train_turns:
                raise DataError(self.template.inconsistency_message(chat.turns, chat.tools, k))
        spans.append((span_start, len(chat.text)))
        return SpannedText(
            chat.text,
            tuple(spans),
            answer_start,
            add_end_token=not self.template.ends_with_end_token(chat.text),
            reference=reference,
            location=location,
        )

    def _join_lines(self, chat: Chat) -> SpannedText:
        """Without a template: instruction, context and answer, one line after the other.

        The tokenizer's own start token goes before them, its end token after them.
        """
        roles = [turn.role for turn in chat.turns]
        if [role for role in roles if role != "system"] != ["user", "assistant"] or chat.tools:
            raise DataError(
                "the tokenizer has no chat template, and only one question with one answer can do without "
                f"(this has {' '.join(roles)}{' and tools' if chat.tools else ''}); set tokenizer.chat_template"
            )
        remarks = check_without_template(chat)
        prompt = "".join(f"{turn.text}\n" for turn in chat.turns if turn.role != "assistant" and turn.text)
        answer = self.template.span_tokenizer.without_end(chat.answer_text())
        text = prompt + answer
        span = (0 if self.train_on == "all" else len(prompt), len(text))
        return SpannedText(text, (span,), len(prompt), True, True, answer, chat.location, remarks)
