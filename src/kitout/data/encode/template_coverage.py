"""What of a chat its template renders: every key of every turn, each of several tool calls, each result under its call.

A template is probed, never parsed: two renderings that should differ and do not show what it leaves out. What is said
(content, reasoning, calls, media) must be rendered, or the chat is refused; other keys become remarks. Each shape of a
turn (its role, the one before it, its keys) is probed once. It knows no token ids and not which turns are trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

from kitout.data.encode.chat_template import REASONING_SWITCHES, ChatTemplate, Tools
from kitout.data.examples.examples import Chat, Turn
from kitout.data.examples.turns import REASONING_KEYS
from kitout.data.read.tables import DataError
from kitout.format import common_prefix_length

SPOKEN_KEYS = ("content", *REASONING_KEYS, "tool_calls", "function_call")  # what a turn says
MEDIA_KEYS = ("image", "images", "audio", "audios", "video", "videos")
LINK_KEYS = ("role", "tool_call_id")  # which call a result is of: its order says so too
_WORDS = ("kingfisher", "nightingale")  # what a key says in two renderings
_CallIndex = tuple[int, int]  # turn, number of the call in it


class TemplateCoverage:
    """Checks chats against one template."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._known: dict[Hashable, Any] = {}

    def order_results(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        """Results of several calls in the order of these calls, if the template does not show which call each is of.

        DataError for a result of a call that no turn before it makes.
        """
        ordered = list(turns)
        start = 0
        while start < len(turns):
            stop = start
            while stop < len(turns) and turns[stop].role == "tool":
                stop += 1
            if stop > start:
                calls = [_call_of_result(turns, k) for k in range(start, stop)]
                if calls != sorted(calls) and not self._shows_ids(turns[:stop]):
                    pairs = sorted(zip(calls, turns[start:stop], strict=True), key=lambda pair: pair[0])
                    ordered[start:stop] = [turn for _, turn in pairs]
            start = stop + 1
        return tuple(ordered)

    def check(self, turns: Sequence[Turn], tools: Tools) -> tuple[str, ...]:
        """Remarks on what is left out and can be; DataError where what a turn says is left out."""
        remarks: list[str] = []
        for k, turn in enumerate(turns):
            for key, what in self._left_out(turns, k, tools):
                if key in (*SPOKEN_KEYS, *MEDIA_KEYS):
                    raise DataError(self._refusal(turns, k, tools, key, what))
                remarks.append(f"the chat template leaves out {what} of {turn.role} turns")
            if turn.role == "tool":
                self._check_call_of(turns, k)
        if len(tools) > 1:
            self._check_tools(turns, tools)
        return tuple(dict.fromkeys(remarks))

    def _left_out(self, turns: Sequence[Turn], k: int, tools: Tools) -> list[tuple[str, str]]:
        """(key, what of it in words) of everything in turn k that does not change the rendering."""
        message = turns[k].message
        calls = message.get("tool_calls") or ()
        is_indented = turns[k].role == "assistant" and str(message.get("content") or "")[:1].isspace()
        keys = tuple(key for key in message if not _is_empty(message[key]))
        call_keys = tuple((*call, *call["function"]) for call in calls)
        shape = (turns[k].role, turns[k - 1].role if k else "", keys, call_keys, bool(tools), is_indented)
        if shape not in self._known:
            answer = next((i for i in range(k, len(turns)) if turns[i].role == "assistant"), len(turns) - 1)
            self._known[shape] = list(self._probe_turn(turns[: answer + 1], k, tools, is_indented))
        known: list[tuple[str, str]] = self._known[shape]
        return known

    def _probe_turn(self, turns: Sequence[Turn], k: int, tools: Tools, is_indented: bool) -> Iterator[tuple[str, str]]:
        message = turns[k].message

        def differ(key: str, *values: Any) -> bool:
            """Whether the rendering tells these values apart."""
            return self._differ(*(_with(turns, k, {**message, key: value}) for value in values), tools=tools)

        for key, value in message.items():
            if key in LINK_KEYS or _is_empty(value):
                continue
            if key in REASONING_KEYS and value in [message.get(other) for other in REASONING_KEYS if other != key]:
                continue  # the same under two names, of which a template reads one
            if key == "tool_calls":
                for what, variants in _vary_calls(value):
                    if not differ(key, *variants):
                        yield key, what
                for what, variants in _vary_other_keys(value):
                    if not differ(key, *variants):
                        yield "", what
            elif not (differ(key, *_WORDS) if isinstance(value, str) else differ(key, value, None)):
                yield key, repr(key)
        if is_indented and not differ("content", _WORDS[0], f"    {_WORDS[0]}"):
            yield "", "the white space at the beginning"

    def _differ(self, *variants: Sequence[Turn], tools: Tools = ()) -> bool:
        """True as well where a template refuses such values: it reads them."""
        try:
            return len({self.template.render(turns, tools) for turns in variants}) > 1
        except DataError:
            return True

    def _refusal(self, turns: Sequence[Turn], k: int, tools: Tools, key: str, what: str) -> str:
        problem = f"the chat template leaves out {what} of turn {k + 1} ({turns[k].role})"
        if key in MEDIA_KEYS:
            return f"{problem}, and only text can be trained on here: leave it out of the data"
        if key not in REASONING_KEYS:
            return f"{problem}, which would be lost; use a template that renders it (tokenizer.chat_template)"
        for name, value in ((name, value) for name in REASONING_SWITCHES for value in (True, False)):
            other = ChatTemplate(self.template.span_tokenizer, {**self.template.template_kwargs, name: value})
            if not any(left == key for left, _ in TemplateCoverage(other)._left_out(turns, k, tools)):
                return f"{problem}; pass {name}={value} to it (data.chat_template_kwargs)"
        return (
            f"{problem}, which would not be trained on: write it into the content as the model should, leave it out of "
            "the data, or use a template that renders it (tokenizer.chat_template)"
        )

    def _shows_ids(self, turns: Sequence[Turn]) -> bool:
        """Whether the template writes the id of the call that the last of these turns answers."""
        return self._once("ids", lambda: self._differ(*(_with(turns, -1, {**turns[-1].message, "tool_call_id": word})
                                                        for word in _WORDS)))  # fmt: skip

    def _check_call_of(self, turns: Sequence[Turn], k: int) -> None:
        """DataError if the template writes the result in turn k under the name of another call than its own."""
        start = max((i for i in range(k) if turns[i].role == "user"), default=0)
        calls = [(i, n) for i in range(start, k) for n in range(len(turns[i].message.get("tool_calls") or ()))]
        own = _call_of_result(turns, k)
        if len(calls) < 2 or own not in calls:
            return
        shape = ("call", tuple((t.role, len(t.message.get("tool_calls") or ())) for t in turns[start : k + 1]), own)
        wrong = self._once(shape, lambda: self._call_it_is_filed_under(turns[: k + 1], calls, own))
        if wrong is not None:
            names = [turns[i].message["tool_calls"][n]["function"]["name"] for i, n in (own, wrong)]
            raise DataError(
                f"turn {k + 1} is the result of the call of {names[0]!r}, and the chat template files it under "
                f"{names[1]!r}: put each result right after its call, or use a template that knows several calls"
            )

    def _call_it_is_filed_under(
        self, turns: Sequence[Turn], calls: Sequence[_CallIndex], own: _CallIndex
    ) -> _CallIndex | None:
        def added_text(call: _CallIndex, word: str) -> str:
            i, n = call
            made = turns[i].message["tool_calls"]
            renamed = _replace_call(made, n, {**made[n]["function"], "name": word})
            changed = _with(turns, i, {**turns[i].message, "tool_calls": renamed})
            before, after = self.template.render(changed[:-1]), self.template.render(changed)
            return after[common_prefix_length(before, after) :]

        try:
            filed = [call for call in calls if added_text(call, _WORDS[0]) != added_text(call, _WORDS[1])]
        except DataError:
            return None  # a template that does not render half a chat; the whole one is rendered later
        return filed[0] if filed and own not in filed else None

    def _check_tools(self, turns: Sequence[Turn], tools: Tools) -> None:
        are_shown = self._once(
            ("tools", len(tools)), lambda: self.template.render(turns, tools) != self.template.render(turns, tools[:-1])
        )
        if not are_shown:
            raise DataError(f"the chat template lists fewer than the {len(tools)} tools of the chat; use one that does")

    def _once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]


def check_without_template(chat: Chat) -> tuple[str, ...]:
    """As `TemplateCoverage.check` where contents and calls alone are read: no template, or an encoder-decoder."""
    remarks: list[str] = []
    for k, turn in enumerate(chat.turns):
        for key in (key for key in turn.message if not _is_empty(turn.message[key])):
            if key in (*REASONING_KEYS, *MEDIA_KEYS):
                raise DataError(
                    f"turn {k + 1} ({turn.role}) has {key!r}, which has no place without a chat template: leave it "
                    "out, or set tokenizer.chat_template of a decoder"
                )
            if key not in (*LINK_KEYS, *SPOKEN_KEYS):
                remarks.append(f"without a chat template {key!r} of {turn.role} turns is left out")
    return tuple(remarks)


def _call_of_result(turns: Sequence[Turn], k: int) -> _CallIndex:
    """Of the result in turn k: the call with its id, else the only one with its name, else the one at its place."""
    message = turns[k].message
    calling = next((i for i in range(k - 1, -1, -1) if turns[i].message.get("tool_calls")), None)
    if calling is None:
        return k, 0
    start = max((i for i in range(k) if turns[i].role == "user"), default=0)
    calls = {
        (i, n): call
        for i in range(start, k)
        for n, call in enumerate(turns[i].message.get("tool_calls") or ())
    }  # fmt: skip
    result_id, name = message.get("tool_call_id"), message.get("name")
    if result_id is not None and any(call.get("id") is not None for call in calls.values()):
        own = [index for index, call in calls.items() if call.get("id") == result_id]
        if not own:
            known = ", ".join(repr(call.get("id")) for call in calls.values())
            raise DataError(
                f"turn {k + 1} is the result of the call {result_id!r}, and no turn before it makes that call ({known})"
            )
        return own[-1]
    named = [(i, n) for (i, n), call in calls.items() if i == calling and call["function"]["name"] == name]
    if len(named) == 1:
        return named[0]
    first = next(i for i in range(k, 0, -1) if turns[i - 1].role != "tool")
    return calling, k - first


def _with(turns: Sequence[Turn], k: int, message: Mapping[str, Any]) -> list[Turn]:
    """The turns with another message in place of the one of turn k; keys with None are left out."""
    changed = list(turns)
    changed[k] = Turn({key: value for key, value in message.items() if value is not None}, turns[k].train_on)
    return changed


def _is_empty(value: Any) -> bool:
    return not value.strip() if isinstance(value, str) else value is None or value in ([], {})


def _vary_calls(calls: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[list[Mapping[str, Any]]]]]:
    """For the name and the arguments of each call: what it is in words, and the calls with two values of it."""
    for i, call in enumerate(calls):
        which = f"call {i + 1} of {len(calls)}" if len(calls) > 1 else "the call"
        function = call["function"]
        yield which, [_replace_call(calls, i, {**function, "name": word}) for word in _WORDS]
        if function.get("arguments"):
            given = [{**function, "arguments": {word: word}} for word in _WORDS]
            yield f"the arguments of {which}", [_replace_call(calls, i, one) for one in given]


def _vary_other_keys(calls: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[list[Mapping[str, Any]]]]]:
    """For what data add to a call or to its function: what it is in words, and the calls with and without it."""
    for i, call in enumerate(calls):
        function = call["function"]
        for key in (key for key in call if key not in ("id", "type", "function") and not _is_empty(call[key])):
            bare = {name: value for name, value in call.items() if name != key}
            yield f"{key!r} of calls", [list(calls), [bare if n == i else one for n, one in enumerate(calls)]]
        for key in (key for key in function if key not in ("name", "arguments") and not _is_empty(function[key])):
            bare = {name: value for name, value in function.items() if name != key}
            yield f"{key!r} of calls", [list(calls), _replace_call(calls, i, bare)]


def _replace_call(calls: Sequence[Mapping[str, Any]], i: int, function: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [{**call, "function": function} if n == i else call for n, call in enumerate(calls)]
