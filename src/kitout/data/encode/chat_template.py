"""A chat in a model's own words: the tokenizer's chat template, and exactly which characters of it are to be learnt.

What a turn adds is what the template renders up to it, less what it renders before it: both are asked of the template,
nothing is looked for in the text. A turn whose place in the whole chat differs from what stood there when it was said
(templates that strip earlier reasoning, or close only the last turn) becomes an example of its own, ending with it.
`{% generation %}` in a template is believed. It knows no ids, no lengths and no files.
Kept by hand: transformers' mask of assistant tokens needs `{% generation %}`, which most templates lack.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2

from kitout.data.encode.spans_to_labels import SpannedText, SpanTokenizer
from kitout.data.examples.examples import Chat, Turn
from kitout.data.read.tables import DataError
from kitout.errors import suggest
from kitout.format import common_prefix_length

TRAIN_ON = ("assistant", "last", "all")
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
REASONING_SWITCHES = ("enable_thinking", "thinking")  # what templates of reasoning models call it
_PROBE_WORD, _OTHER_PROBE_WORD = "kingfisher", "nightingale"  # what two turns say that should render differently


class ChatTemplate:
    """A tokenizer's chat template. learn: "assistant" (every assistant turn), "last" (of them) or "all" of the text.

    options: what the template itself can be told, such as {"enable_thinking": False}. Raises DataError where the
    template knows no assistant. Without a template, `mark` joins single exchanges by lines.
    """

    def __init__(
        self,
        span_tokenizer: SpanTokenizer,
        train_on: str = "assistant",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if train_on not in TRAIN_ON:
            raise DataError(f"learn is {train_on!r}; {suggest(train_on, TRAIN_ON)}")
        self.span_tokenizer, self.train_on, self.template_kwargs = span_tokenizer, train_on, dict(template_kwargs or {})
        self.tokenizer = span_tokenizer.tokenizer
        self._content_is_parts = (
            False  # whether contents are lists of parts, as templates for text and images have them
        )
        self._feature_errors: dict[str, str] = {}  # role or feature -> what is wrong with it, "" where nothing is
        if self.tokenizer.chat_template:
            self._check_assistant()

    def render_spans(self, chat: Chat) -> list[SpannedText]:
        """The chat as one text, or as several where the template forgets. Raises DataError with what is wrong."""
        learnt = self._turns_to_train(chat)
        if not self.tokenizer.chat_template:
            return [self._without_template(chat)]
        turns, tools = self._fit_turns(chat)
        learnt = [k + len(turns) - len(chat.turns) for k in learnt]  # a merged system turn moves all others
        if self.train_on == "all":
            return [self._whole_chat(turns, tools, learnt, chat.location)]
        made: list[SpannedText] = []
        while learnt:
            marked, learnt = self._longest_prefix(turns, tools, learnt, chat.location)
            made.append(marked)
        return made[::-1]

    def _turns_to_train(self, chat: Chat) -> list[int]:
        """The turns to learn: what the data says of a turn goes before what was asked for."""
        spoken = [k for k, turn in enumerate(chat.turns) if turn.role == "assistant"]
        for k, turn in enumerate(chat.turns):
            if turn.train_on and turn.role != "assistant":
                raise DataError(f"turn {k + 1} ({turn.role}) is marked to be learnt; only assistant turns can be")
        wanted = [k for k in spoken if self.train_on != "last" or k == spoken[-1]]
        learnt = [k for k in spoken if (chat.turns[k].train_on if chat.turns[k].train_on is not None else k in wanted)]
        if not learnt and self.train_on != "all":
            raise DataError("no assistant turn is to be learnt" if spoken else "there is no assistant turn to learn")
        if 0 in learnt and self.train_on != "all":
            raise DataError(
                "it starts with an assistant turn, which nothing asks for; start with a user turn, or mark that turn "
                '("learn": false)'
            )
        return learnt

    def _longest_prefix(
        self, turns: Sequence[Turn], tools: Any, train_turns: list[int], location: str
    ) -> tuple[SpannedText, list[int]]:
        """The chat up to its last learnt turn with every turn that stands in it as it was said; and the other turns."""
        last = train_turns[-1]
        text = self._render(turns[: last + 1], tools)
        found = {k: self._turn_span(turns, tools, k, text) for k in train_turns}
        region = found[last]
        if region is None:
            raise DataError(self._inconsistent_prompt(turns, tools, last))
        kept = {k: span for k, span in found.items() if span is not None}
        ended = not self._is_closed(text[region[0] : region[1]])
        if ended:  # no turn of this template closes with a token: each needs the one that is put behind the text
            kept = {last: region}
        tail = len(text) if ended else region[1]
        spans = self._generation_tags(turns[: last + 1], tools, text, list(kept.values()))
        marked = SpannedText(
            text[:tail], spans, region[0], add_end_token=ended, reference=turns[last].text, location=location
        )
        return marked, [k for k in train_turns if k not in kept]

    def _turn_span(self, turns: Sequence[Turn], tools: Any, k: int, text: str) -> tuple[int, int] | None:
        """Where text holds what turn k adds when it is said, its end token included; None where it does not."""
        if k == 0:
            return None
        before = self._render(turns[:k], tools, add_generation_prompt=True)
        after = self._render(turns[: k + 1], tools)
        if not after.startswith(before) or not text.startswith(before):
            return None
        same = common_prefix_length(text, after)
        for token in self._end_tokens.finditer(after, len(before)):
            if token.start() < same < token.end():
                same = token.start()
        if self._end_tokens.sub("", after[same:]).strip():
            return None
        said, whole = text[len(before) : same], after[len(before) :]
        if self._is_closed(whole) and not self._is_closed(said):
            return None
        return len(before), len(before) + len(self._trim(said))

    @cached_property
    def _end_tokens(self) -> re.Pattern[str]:
        """Tokens that can end a turn: the special ones, and those the template writes behind a turn."""
        added = {str(t) for t in self.tokenizer.added_tokens_decoder.values()}
        behind = self._render(_probe_chat(_PROBE_WORD), ()).partition(_PROBE_WORD)[2]
        ends = {
            *self.span_tokenizer.special_tokens.values(),
            *(token for token in added if token.strip() and token in behind),
        }
        return re.compile("|".join(map(re.escape, sorted(ends, key=len, reverse=True))) or r"(?!)")

    def _is_closed(self, text: str) -> bool:
        return any(not text[m.end() :].strip() for m in self._end_tokens.finditer(text))

    def _trim(self, text: str) -> str:
        """Without white space behind the last end token: what a template writes between turns is nobody's answer."""
        return text.rstrip() if self._is_closed(text) else text

    def _whole_chat(self, turns: Sequence[Turn], tools: Any, train_turns: list[int], location: str) -> SpannedText:
        """Everything, less the turns that the data says are not to be learnt."""
        text = self._render(turns, tools)
        spans, at, answer = [], 0, 0
        for k, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            region = self._turn_span(turns, tools, k, text)
            if region is None and k not in train_turns:
                raise DataError(self._inconsistent_prompt(turns, tools, k))
            if region is not None and k not in train_turns:
                spans.append((at, region[0]))
                at = region[1]
            elif region is not None:
                answer = region[0]
        spans.append((at, len(text)))
        last = next((t.text for t in reversed(turns) if t.role == "assistant"), "")
        return SpannedText(
            text, tuple(spans), answer, add_end_token=not self._is_closed(text), reference=last, location=location
        )

    def _generation_tags(
        self, turns: Sequence[Turn], tools: Any, text: str, turn_spans: list[tuple[int, int]]
    ) -> tuple[tuple[int, int], ...]:
        """What the template itself marks of the regions, where it does, and the end tokens behind it."""
        if not _GENERATION_TAG.search(self._template_source(tools)):
            return tuple(turn_spans)
        learnt = self._tagged_spans(turns, tools)
        spans: list[tuple[int, int]] = []
        for start, end in turn_spans:
            inside = [(a, b) for a, b in learnt if a < end and b > start]
            if not inside:
                raise DataError("the template's {% generation %} marks nothing of an assistant turn")
            close = next((m.start() for m in self._end_tokens.finditer(text, inside[-1][1], end)), end)
            runs = [*inside, (close, end)] if close < end else inside
            for a, b in ((max(a, start), min(b, end)) for a, b in runs):
                if spans and a <= spans[-1][1] and spans[-1][1] > start:
                    spans[-1] = (spans[-1][0], max(b, spans[-1][1]))
                else:
                    spans.append((a, b))
        return tuple(spans)

    def _without_template(self, chat: Chat) -> SpannedText:
        """Without a template: instruction, context and answer one below the other.

        The tokenizer's own start token goes in front, the end token behind.
        """
        roles = [turn.role for turn in chat.turns]
        if [r for r in roles if r != "system"] != ["user", "assistant"] or chat.tools:
            raise DataError(
                "the tokenizer has no chat template, and only one question with one answer can do without "
                f"(this has {' '.join(roles)}{' and tools' if chat.tools else ''}); set tokenizer.chat_template"
            )
        given = "".join(f"{turn.text}\n" for turn in chat.turns if turn.role != "assistant")
        text = given + chat.answer_text()
        whole = ((0 if self.train_on == "all" else len(given)), len(text))
        return SpannedText(text, (whole,), len(given), True, True, chat.answer_text(), chat.location)

    def _fit_turns(self, chat: Chat) -> tuple[tuple[Turn, ...], tuple[Mapping[str, Any], ...]]:
        """The turns as this template can say them: a system turn it does not know opens the first user turn."""
        turns = chat.turns
        if turns[0].role == "system" and self._feature_error("system", self._ignores_system):
            if len(turns) < 2 or turns[1].role != "user":
                raise DataError(f"the template {self._feature_errors['system']}, and no user turn follows to say it in")
            words = {**turns[1].message, "content": f"{turns[0].text}\n\n{turns[1].text}"}
            turns = (Turn(words, turns[1].train_on), *turns[2:])
        if chat.tools and self._feature_error("tools", lambda: self._same_without_tools(turns, chat.tools)):
            raise DataError("the chat has tools, which the template leaves out; use a template that lists tools")
        called = next((k for k, t in enumerate(turns) if t.message.get("tool_calls")), None)
        if called is not None and self._feature_error(
            "tool_calls", lambda: self._same_without_calls(turns[: called + 1])
        ):
            raise DataError("a turn calls tools, which the template leaves out; use a template that knows tool calls")
        answered = next((k for k, t in enumerate(turns) if t.role == "tool"), None)
        if answered is not None and self._feature_error(
            "tool", lambda: self._ignores(turns[: answered + 1], chat.tools)
        ):
            raise DataError(f"the template {self._feature_errors['tool']}")
        return turns, chat.tools

    def _feature_error(self, feature: str, check: Any) -> str:
        if feature not in self._feature_errors:
            self._feature_errors[feature] = check()
        return self._feature_errors[feature]

    def _ignores_system(self) -> str:
        return self._ignores(
            (Turn({"role": "system", "content": _PROBE_WORD}), Turn({"role": "user", "content": "a"})), at=0
        )

    def _ignores(self, turns: Sequence[Turn], tools: Any = (), at: int = -1) -> str:
        """What is wrong with the turn at this place: refused, or the same whatever it says."""
        role, seen = turns[at].role, []
        for said in (_PROBE_WORD, _OTHER_PROBE_WORD):
            changed = list(turns)
            changed[at] = Turn({**turns[at].message, "content": said})
            try:
                seen.append(self._render(changed, tools))
            except DataError as wrong:
                return f"refuses the role {role!r} ({wrong})"
        return f"leaves out what the role {role!r} says" if seen[0] == seen[1] else ""

    def _same_without_tools(self, turns: Sequence[Turn], tools: Any) -> str:
        return "same" if self._render(turns, tools) == self._render(turns, ()) else ""

    def _same_without_calls(self, turns: Sequence[Turn]) -> str:
        bare = {k: v for k, v in turns[-1].message.items() if k != "tool_calls"}
        return "same" if self._render(turns, ()) == self._render([*turns[:-1], Turn(bare)], ()) else ""

    def _check_assistant(self) -> None:
        wrong = self._ignores(_probe_chat(_PROBE_WORD))
        if wrong:
            self._content_is_parts = True
            if not self._ignores(_probe_chat(_PROBE_WORD)):
                return
            raise DataError(
                f"the tokenizer's chat template {wrong}, so no answer could be learnt; set one that knows it "
                "(tokenizer.chat_template), or take the chat version of the model"
            )

    def _inconsistent_prompt(self, turns: Sequence[Turn], tools: Any, k: int) -> str:
        """What a template asks with and does not write, and the switch that mends it, if it has one of the usual."""
        before, after = self._render(turns[:k], tools, add_generation_prompt=True), self._render(turns[: k + 1], tools)
        same = common_prefix_length(before, after)
        told = (
            f"the template asks for turn {k + 1} with {before[-60:]!r} but writes the answered turn as "
            f"{after[max(0, same - 20) : same + 40]!r}: what is learnt would not be what is asked for; "
        )
        for name, value in ((name, value) for name in REASONING_SWITCHES for value in (False, True)):
            other = ChatTemplate(self.span_tokenizer, self.train_on, {**self.template_kwargs, name: value})
            if other._render(turns[: k + 1], tools).startswith(
                other._render(turns[:k], tools, add_generation_prompt=True)
            ):
                return f"{told}tell it {name}={value}, here and wherever the model is asked"
        return f"{told}use a template that keeps what it asks with (tokenizer.chat_template)"

    def _tagged_spans(self, turns: Sequence[Turn], tools: Any) -> list[tuple[int, int]]:
        """The characters between {% generation %} and its end, stretch by stretch."""
        from transformers.utils.chat_template_utils import render_jinja_template

        _, stretches = render_jinja_template(
            [self._messages(turns)], tools=list(tools) or None, chat_template=self._template_source(tools),
            return_assistant_tokens_mask=True, **self.tokenizer.special_tokens_map, **self.template_kwargs,
        )  # fmt: skip
        return [(a, b) for a, b in stretches[0] if a < b]

    def _render(self, turns: Sequence[Turn], tools: Any, add_generation_prompt: bool = False) -> str:
        how = {"tools": list(tools) or None, "add_generation_prompt": add_generation_prompt, **self.template_kwargs}
        try:
            return str(self.tokenizer.apply_chat_template(self._messages(turns), tokenize=False, **how))
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as wrong:  # whatever a template stumbles over
            raise DataError(f"the chat template fails: {str(wrong)[:200]}") from wrong

    def _messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        if not self._content_is_parts:
            return [dict(turn.message) for turn in turns]
        return [
            {**turn.message, "content": [{"type": "text", "text": turn.message.get("content") or ""}]} for turn in turns
        ]

    def _template_source(self, tools: Any) -> str:
        return str(self.tokenizer.get_chat_template(tools=list(tools) or None))


def _probe_chat(answer: str) -> tuple[Turn, ...]:
    return Turn({"role": "user", "content": "a"}), Turn({"role": "assistant", "content": answer})
