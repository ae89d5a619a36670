"""A tokenizer's chat template: how it renders a chat, what it supports, and which tokens end a turn.

A template is probed, never parsed: two renderings that should differ and do not show what it leaves out. What it does
not support is an error with the way out; only a system turn is moved into the first user turn. `{% generation %}` in
a template is read as it is. It knows no token ids, no lengths, no files and not which turns are trained on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

from kitout.data.encode.spans_to_labels import SpanTokenizer
from kitout.data.examples.examples import Chat, Turn
from kitout.data.read.tables import DataError
from kitout.format import common_prefix_length

Tools: TypeAlias = Sequence[Mapping[str, Any]]

REASONING_SWITCHES = ("enable_thinking", "thinking")  # what templates of reasoning models call it
NO_REASONING = "<think>\n\n</think>\n\n"
# What `render` sets itself: with another value of these, no turn would be found in the text.
OWN_ARGUMENTS = (
    *("messages", "conversation", "tools", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
)
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE_WORD, _OTHER_PROBE_WORD = "kingfisher", "nightingale"  # what two turns say that should render differently


class ChatTemplate:
    """The chat template of a tokenizer with the settings it is rendered with.

    template_kwargs: for the template, such as {"enable_thinking": False}. Raises DataError if the template does not
    render assistant turns.
    """

    def __init__(self, span_tokenizer: SpanTokenizer, template_kwargs: Mapping[str, Any] | None = None) -> None:
        self.span_tokenizer, self.template_kwargs = span_tokenizer, dict(template_kwargs or {})
        self.tokenizer = span_tokenizer.tokenizer
        self._content_is_parts = False  # contents as lists of parts, as templates for text and images take them
        self._feature_errors: dict[str, str] = {}  # role or feature -> why it is not supported, "" if it is
        own = [name for name in self.template_kwargs if name in OWN_ARGUMENTS]
        if own:
            raise DataError(f"data.chat_template_kwargs sets {', '.join(own)}, which is set here: leave it out")
        if self.exists:
            self._check_assistant()

    @property
    def exists(self) -> bool:
        """Whether the tokenizer has a template at all."""
        return bool(self.tokenizer.chat_template)

    def render(self, turns: Sequence[Turn], tools: Tools = (), add_generation_prompt: bool = False) -> str:
        """The turns as one text. add_generation_prompt: with what a served model is asked for the next turn with."""
        options = {"tools": list(tools) or None, "add_generation_prompt": add_generation_prompt, **self.template_kwargs}
        try:
            return str(self.tokenizer.apply_chat_template(self._messages(turns), tokenize=False, **options))
        except Exception as error:  # a template is a program: it may fail in any way
            raise DataError(f"the chat template fails: {str(error)[:200] or type(error).__name__}") from error

    def tagged_spans(self, turns: Sequence[Turn], tools: Tools) -> list[tuple[int, int]] | None:
        """The characters between each {% generation %} and its end; None if the template has no such tag."""
        source = str(self.tokenizer.get_chat_template(tools=list(tools) or None))
        if not _GENERATION_TAG.search(source):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        _, spans = render_jinja_template(
            [self._messages(turns)], tools=list(tools) or None, chat_template=source,
            return_assistant_tokens_mask=True, **self.tokenizer.special_tokens_map, **self.template_kwargs,
        )  # fmt: skip
        return [(start, end) for start, end in spans[0] if start < end]

    @cached_property
    def end_tokens(self) -> re.Pattern[str]:
        """Tokens that can end a turn: the special ones, and those the template writes after a turn."""
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        ends = {
            *self.span_tokenizer.special_tokens.values(),
            *(token for token in added if token.strip() and token in self._after_turn),
        }
        return re.compile("|".join(map(re.escape, sorted(ends, key=len, reverse=True))) or r"(?!)")

    @cached_property
    def _after_turn(self) -> str:
        """What the template writes after an assistant turn that ends the chat."""
        return self.render(_probe_chat(_PROBE_WORD)).partition(_PROBE_WORD)[2]

    @cached_property
    def end_tokens_of_turn(self) -> tuple[str, ...]:
        """The tokens that end an answer: those that the template writes right behind it."""
        first = self.end_tokens.search(self._after_turn)
        return (first.group(),) if first is not None and not self._after_turn[: first.start()].strip() else ()

    def without_end_tokens(self, turns: Sequence[Turn]) -> tuple[Turn, ...]:
        """The turns without the end tokens that the data have written behind an answer and the template writes too."""
        written = [token.group() for token in self.end_tokens.finditer(self._after_turn)]
        closed = []
        for turn in turns:
            content = turn.message.get("content")
            if turn.role == "assistant" and isinstance(content, str):
                while end := next((token for token in written if content.rstrip().endswith(token)), None):
                    content = content.rstrip().removesuffix(end)
                turn = (
                    turn
                    if content is turn.message["content"]
                    else Turn({**turn.message, "content": content}, turn.train_on)
                )
            closed.append(turn)
        return tuple(closed)

    def ends_with_end_token(self, text: str) -> bool:
        """White space after the last end token does not count."""
        return any(not text[token.end() :].strip() for token in self.end_tokens.finditer(text))

    def fit_turns(self, chat: Chat) -> tuple[tuple[Turn, ...], Tools]:
        """The turns and tools as this template supports them: it may not know system turns.

        Such a system turn opens the first user turn. DataError for anything else that the template leaves out.
        """
        turns = chat.turns
        if turns[0].role == "system" and self._feature_error("system", self._ignores_system):
            if len(turns) < 2 or turns[1].role != "user":
                raise DataError(f"the template {self._feature_errors['system']}, and no user turn follows to say it in")
            message = {**turns[1].message, "content": f"{turns[0].text}\n\n{turns[1].text}"}
            turns = (Turn(message, turns[1].train_on), *turns[2:])
        if chat.tools and self._feature_error("tools", lambda: self._ignores_tools(turns, chat.tools)):
            raise DataError("the chat has tools, which the template leaves out; use a template that lists tools")
        calling = next((k for k, turn in enumerate(turns) if turn.message.get("tool_calls")), None)
        if calling is not None and self._feature_error("tool_calls", lambda: self._ignores_calls(turns[: calling + 1])):
            raise DataError("a turn calls tools, which the template leaves out; use a template that knows tool calls")
        result = next((k for k, turn in enumerate(turns) if turn.role == "tool"), None)
        if result is not None and self._feature_error("tool", lambda: self._ignores(turns[: result + 1], chat.tools)):
            raise DataError(f"the template {self._feature_errors['tool']}")
        return turns, chat.tools

    def inconsistency_message(self, turns: Sequence[Turn], tools: Tools, k: int) -> str:
        """Turn k is not what the generation prompt before it asks for: how they differ, and the way out.

        If one of the usual switches makes both agree for every answer, the message names it. turns: of the whole chat.
        """
        prompt, answered = self.render(turns[:k], tools, add_generation_prompt=True), self.render(turns[: k + 1], tools)
        same = common_prefix_length(prompt, answered)
        problem = (
            f"the template asks for turn {k + 1} with {prompt[-60:]!r} but writes the answered turn as "
            f"{answered[max(0, same - 20) : same + 40]!r}: training would not match generation; "
        )
        spoken = [j for j, turn in enumerate(turns) if turn.role == "assistant" and j > 0]
        fits_some_turn = False
        for name, value in ((name, value) for name in REASONING_SWITCHES for value in (False, True)):
            other = ChatTemplate(self.span_tokenizer, {**self.template_kwargs, name: value})
            if other.keeps_its_prompt(turns, tools, k):
                if all(other.keeps_its_prompt(turns, tools, j) for j in spoken):
                    return f"{problem}pass {name}={value} to it, here and wherever the model generates"
                fits_some_turn = True
        if fits_some_turn:
            return (
                f"{problem}no switch of the template fits all answers of this chat, of which some have reasoning and "
                'others have none: split the chat, or leave the others out of training ("train": false)'
            )
        reasoned = Turn({**turns[k].message, "content": f"{NO_REASONING}{turns[k].message.get('content') or ''}"})
        if self.keeps_its_prompt([*turns[:k], reasoned], tools, k):
            return f"{problem}write the reasoning in front of each answer ({NO_REASONING!r} where there is none)"
        return f"{problem}use a template that keeps its generation prompt (tokenizer.chat_template)"

    def keeps_its_prompt(self, turns: Sequence[Turn], tools: Tools, k: int) -> bool:
        """Whether turn k, when it is the last, begins with what a served model is asked for it with."""
        answered = self.render(turns[: k + 1], tools)
        return answered.startswith(self.render(turns[:k], tools, add_generation_prompt=True))

    def _check_assistant(self) -> None:
        error = self._ignores(_probe_chat(_PROBE_WORD))
        if not error:
            return
        self._content_is_parts = True
        if self._ignores(_probe_chat(_PROBE_WORD)):
            raise DataError(
                f"the tokenizer's chat template {error}, so no answer can be trained on; set one that knows it "
                "(tokenizer.chat_template), or take the chat version of the model"
            )

    def _feature_error(self, feature: str, check: Callable[[], str]) -> str:
        """Each feature is probed once."""
        if feature not in self._feature_errors:
            self._feature_errors[feature] = check()
        return self._feature_errors[feature]

    def _ignores_system(self) -> str:
        system = Turn({"role": "system", "content": _PROBE_WORD})
        return self._ignores((system, Turn({"role": "user", "content": "a"})), position=0)

    def _ignores(self, turns: Sequence[Turn], tools: Tools = (), position: int = -1) -> str:
        """Why the turn at this position is not supported: it is refused, or renders the same whatever it says."""
        role, rendered = turns[position].role, []
        for content in (_PROBE_WORD, _OTHER_PROBE_WORD):
            changed = list(turns)
            changed[position] = Turn({**turns[position].message, "content": content})
            try:
                rendered.append(self.render(changed, tools))
            except DataError as error:
                return f"refuses the role {role!r} ({error})"
        return f"leaves out what the role {role!r} says" if rendered[0] == rendered[1] else ""

    def _ignores_tools(self, turns: Sequence[Turn], tools: Tools) -> str:
        return "same" if self.render(turns, tools) == self.render(turns) else ""

    def _ignores_calls(self, turns: Sequence[Turn]) -> str:
        without_calls = {name: value for name, value in turns[-1].message.items() if name != "tool_calls"}
        return "same" if self.render(turns) == self.render([*turns[:-1], Turn(without_calls)]) else ""

    def _messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        if not self._content_is_parts:
            return [dict(turn.message) for turn in turns]
        return [
            {**turn.message, "content": [{"type": "text", "text": turn.message.get("content") or ""}]} for turn in turns
        ]


def _probe_chat(answer: str) -> tuple[Turn, ...]:
    return Turn({"role": "user", "content": "a"}), Turn({"role": "assistant", "content": answer})
