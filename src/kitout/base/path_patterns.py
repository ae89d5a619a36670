"""Regular expressions over module paths, matched in bounded time whatever the pattern.

A pattern means what `re.fullmatch` means by it. It may come from a file, and `re` can take forever on a short one
(".?" * 24 + "!"), so anything that could backtrack runs as an automaton instead: from the end of the path to its start,
with the set of states that accept the rest, one set per character, each transition computed once. Lookahead and
lookbehind are supported; backreferences, flags and atomic groups are not. It knows no module and no site.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

from kitout.errors import TargetError

if sys.version_info >= (3, 11):
    from re import _parser as sre_parse
else:
    import sre_parse

MAX_PATTERN_CHARS = 2000
MAX_STATES = 2000  # of one automaton; a repeated group counts once per repetition
MAX_STEPS = 5_000_000  # states computed by one pattern over all paths: about a second
MAX_TRANSITIONS = 50_000  # kept by one pattern
NAMES = re.compile(r"(?:\w|\\\W|\|)*")  # escaped paths side by side, as `save_peft` writes them
PLAIN = {"LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"}  # a sequence of these cannot backtrack

CharTest = Callable[[str], bool]
PositionTest = Callable[[str, int], bool]


class PathPattern:
    """One pattern; `matches(path)` says whether the whole path fits. Raises TargetError for what it cannot read."""

    def __init__(self, text: str, at_end: bool = False) -> None:
        """at_end: the end of the path is enough, from a dot on, as in PEFT's rank_pattern."""
        self.matches: Callable[[str], Any]
        self.is_automaton = False
        if not at_end and NAMES.fullmatch(text):
            self.matches = {re.sub(r"\\(.)", r"\1", name) for name in text.split("|")}.__contains__
            return
        whole = rf"(.*\.)?({text})$" if at_end else text
        if len(text) > MAX_PATTERN_CHARS:
            raise TargetError(f"the pattern {text[:60]!r}... has {len(text)} characters, more than {MAX_PATTERN_CHARS}")
        try:
            tree: Any = sre_parse.parse(text)
            if all(str(op) in PLAIN for op, _ in tree) and not tree.state.flags & ~re.UNICODE:
                self.matches = re.compile(whole).fullmatch
            else:
                self.matches, self.is_automaton = PathAutomaton(sre_parse.parse(whole), text).matches, True
        except RecursionError:
            raise TargetError(f"the pattern {text[:60]!r} is nested too deeply") from None
        except (re.error, OverflowError, ValueError) as error:
            if isinstance(error, TargetError):
                raise
            raise TargetError(f"{text[:60]!r} is not a regular expression: {error}") from None


class PathAutomaton:
    """The states of a pattern. A state holds at a position if it accepts the path from there to its end.

    From the states that hold after a character follow those that hold before it. A lookahead is a set of states of its
    own, one level deeper, that accepts anywhere; levels are computed from the deepest up.
    """

    def __init__(self, tree: Any, text: str, is_lookbehind: bool = False) -> None:
        self.text, self.is_lookbehind = text, is_lookbehind
        self.size, self.steps = 0, 0
        self.num_states, self.level = 0, 0
        self.chars: list[list[tuple[int, CharTest, int]]] = [[]]  # per level: state, test, state after the character
        self.accepts_anywhere: list[list[int]] = [[]]  # per level
        self.before: dict[int, list[tuple[int, int | None, int | None, bool]]] = {}  # state -> what follows from it
        self.tests: list[PositionTest] = []
        self.transitions: dict[tuple[frozenset[int], str, int], frozenset[int]] = {}
        if tree.state.flags & ~re.UNICODE:
            raise self._refusal("flags")
        self.end = self._new_state()
        self.start = self._add(tree, self.end)

    def matches(self, path: str) -> bool:
        holds = self._transition(frozenset(), "", self._tests_at(path, len(path)))
        for position in range(len(path) - 1, -1, -1):
            holds = self._transition(holds, path[position], self._tests_at(path, position))
        return self.start in holds

    def _tests_at(self, path: str, position: int) -> int:
        return sum(1 << i for i, test in enumerate(self.tests) if test(path, position))

    def _transition(self, after: frozenset[int], char: str, tests: int) -> frozenset[int]:
        """The states that hold before a character; char "" is the end of the path."""
        key = (after, char, tests)
        found = self.transitions.get(key)
        if found is None:
            self.steps += self.num_states
            if self.steps > MAX_STEPS:
                self.steps = 0
                raise TargetError(f"the pattern {self.text[:60]!r} takes too long to match: write a simpler one")
            if len(self.transitions) > MAX_TRANSITIONS:
                self.transitions.clear()
            found = self.transitions[key] = self._states_before(after, char, tests)
        return found

    def _states_before(self, after: frozenset[int], char: str, tests: int) -> frozenset[int]:
        holds: set[int] = set()
        for level in reversed(range(len(self.chars))):
            pending = list(self.accepts_anywhere[level])
            if char:
                pending += [state for state, test, target in self.chars[level] if target in after and test(char)]
            elif level == 0:
                pending.append(self.end)
            while pending:
                state = pending.pop()
                if state in holds:
                    continue
                holds.add(state)
                for source, test_number, inner, negated in self.before.get(state, ()):
                    if test_number is not None and not tests >> test_number & 1:
                        continue
                    if inner is None or (inner in holds) != negated:
                        pending.append(source)
        return frozenset(holds)

    # ---- building ----------------------------------------------------------------------------------------------

    def _refusal(self, what: str) -> TargetError:
        return TargetError(f"{what} in a pattern over module paths are not supported: {self.text[:60]!r}")

    def _new_state(self) -> int:
        self.num_states += 1
        return self.num_states - 1

    def _count(self) -> None:
        self.size += 1
        if self.size > MAX_STATES:
            raise TargetError(f"the pattern {self.text[:60]!r} is more complicated than kitout reads")

    def _link(self, target: int, test: int | None = None, inner: int | None = None, negated: bool = False) -> int:
        """A new state that holds where `target` does, if the test (and the lookahead) hold there too."""
        state = self._new_state()
        self.before.setdefault(target, []).append((state, test, inner, negated))
        return state

    def _add(self, items: Iterable[tuple[Any, Any]], target: int) -> int:
        """The state that accepts these items and then what `target` accepts."""
        for op, argument in reversed(list(items)):
            self._count()
            target = self._add_item(str(op), argument, target)
        return target

    def _add_item(self, op: str, argument: Any, target: int) -> int:
        if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            state = self._new_state()
            self.chars[self.level].append((state, _char_test(op, argument), target))
            return state
        if op in ("BRANCH", "FAILURE"):
            return self._any_of([self._add(branch, target) for branch in argument[1]] if op == "BRANCH" else [])
        if op == "SUBPATTERN":
            _, added_flags, removed_flags, items = argument
            if added_flags or removed_flags:
                raise self._refusal("flags")
            return self._add(items, target)
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, items = argument
            return self._add_repeat(least, most, items, target)
        if op == "AT" and not self.is_lookbehind:
            return self._link(target, self._add_test(_position_test(str(argument))))
        if op in ("ASSERT", "ASSERT_NOT") and not self.is_lookbehind:
            direction, items = argument
            return self._add_look(direction, items, op == "ASSERT_NOT", target)
        raise self._refusal(op.lower().replace("_", " ") + "s")

    def _any_of(self, targets: Iterable[int]) -> int:
        state = self._new_state()
        for target in targets:
            self.before.setdefault(target, []).append((state, None, None, False))
        return state

    def _add_repeat(self, least: int, most: Any, items: Any, target: int) -> int:
        if most == sre_parse.MAXREPEAT:
            loop = self._any_of([target])
            self.before.setdefault(self._add(items, loop), []).append((loop, None, None, False))
            last = loop
        else:
            last = target
            for _ in range(int(most) - least):
                self._count()
                last = self._any_of([self._add(items, last), target])
        for _ in range(least):
            self._count()
            last = self._add(items, last)
        return last

    def _add_test(self, test: PositionTest) -> int:
        self.tests.append(test)
        return len(self.tests) - 1

    def _add_look(self, direction: int, items: Any, negated: bool, target: int) -> int:
        if direction < 0:
            width = int(items.getwidth()[0])  # `re` only reads those of one width
            behind = PathAutomaton(items, self.text, is_lookbehind=True)

            def looks_back(path: str, position: int) -> bool:
                fits = position >= width and behind.matches(path[position - width : position])
                return fits != negated

            return self._link(target, self._add_test(looks_back))
        self.level += 1
        if self.level == len(self.chars):
            self.chars.append([])
            self.accepts_anywhere.append([])
        anywhere = self._new_state()
        self.accepts_anywhere[self.level].append(anywhere)
        inner = self._add(items, anywhere)
        self.level -= 1
        return self._link(target, inner=inner, negated=negated)


def _char_test(op: str, argument: Any) -> CharTest:
    if op == "LITERAL":
        return chr(argument).__eq__
    if op == "NOT_LITERAL":
        return chr(argument).__ne__
    if op == "ANY":
        return "\n".__ne__
    negated = str(argument[0][0]) == "NEGATE"
    tests = [_set_item_test(str(kind), value) for kind, value in argument[negated:]]
    return lambda char: any(test(char) for test in tests) != negated


def _set_item_test(kind: str, value: Any) -> CharTest:
    if kind == "LITERAL":
        return chr(value).__eq__
    if kind == "RANGE":
        low, high = value
        return lambda char: low <= ord(char) <= high
    *_, negation, name = ("", *str(value).replace("CATEGORY_", "").split("_"))
    test = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": _is_word}[name]
    return (lambda char: not test(char)) if negation == "NOT" else test


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


def _position_test(kind: str) -> PositionTest:
    """The start or end of the path, or of a word."""
    if kind in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        return lambda _, position: position == 0
    if kind == "AT_END_STRING":
        return lambda path, position: position == len(path)
    if kind == "AT_END":
        return lambda path, position: path[position:] in ("", "\n")
    wanted = kind == "AT_BOUNDARY"

    def is_boundary(path: str, position: int) -> bool:
        before = position > 0 and _is_word(path[position - 1])
        return (before != (position < len(path) and _is_word(path[position]))) == wanted

    return is_boundary
