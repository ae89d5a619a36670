"""The suites of forgetting: sets that no adapter was trained for, of knowledge, of plain English and of chat.

quick: 200 questions of each set and 300 texts; full: all of them. Questions are put plainly and, in the full suite, by
the chat template as well. They come from the built-in sets (`kitout assets list`). It knows no model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kitout.assets.store import fetch_asset
from kitout.data.encode.chat_template import ChatTemplate
from kitout.data.encode.spans_to_labels import SpanTokenizer
from kitout.data.examples.examples import Example, Turn
from kitout.data.read.sources import load_examples, open_source
from kitout.errors import ConfigError, suggest
from kitout.evaluate.ask.choices import CHAT, read_choices
from kitout.evaluate.sets.choice_set import ChoiceSet
from kitout.evaluate.sets.evaluation_set import sample
from kitout.evaluate.sets.text_set import TextSet

SUITES = ("none", "quick", "full")
CHOICES = ("obqa", "csqa", "siqa", "piqa", "mmlu-tiny")
TEXTS, PROMPTS = "wiki", "chat"
NUM_QUESTIONS, NUM_TEXTS, NUM_PROMPTS = 200, 300, 100  # of the quick suite


def check_suite(suite: str) -> None:
    """ConfigError for another name."""
    if suite not in SUITES:
        raise ConfigError(f"suite={suite!r}: {suggest(suite, SUITES)}")


def fetch_suite(suite: str, log: Callable[[str], None]) -> None:
    """Its built-in data, where they are not here yet. log: gets a line about each."""
    check_suite(suite)
    for name in (*CHOICES, TEXTS, PROMPTS) if suite != "none" else ():
        fetch_asset(name, log)


def suite_sets(suite: str, tokenizer: Any, seed: int, log: Callable[[str], None]) -> list[ChoiceSet | TextSet]:
    """Its sets; built-in data that are not here yet are fetched. log: gets a line about each."""
    fetch_suite(suite, log)
    if suite == "none":
        return []
    is_quick = suite == "quick"
    template = ChatTemplate(SpanTokenizer(tokenizer))
    sets: list[ChoiceSet | TextSet] = []
    for name in CHOICES:
        rows = [values for table in open_source(str(fetch_asset(name, log))) for _, values in table.read_rows()]
        questions = sample(read_choices(rows, name), NUM_QUESTIONS if is_quick else None, seed)
        sets.append(ChoiceSet(name, tuple(questions)))
        if not is_quick and template.exists:
            sets.append(ChoiceSet(f"{name} (chat template)", tuple(questions), CHAT))
    texts = [text for example in _examples(TEXTS, log) if (text := example.source_text())]
    sets.append(TextSet(TEXTS, tuple(sample(texts, NUM_TEXTS if is_quick else None, seed)), divergence=True))
    prompts = dict.fromkeys(example.source_text() for example in _examples(PROMPTS, log))
    turns = sample(list(prompts), NUM_PROMPTS if is_quick else None, seed)
    if template.exists:
        turns = [template.render([Turn({"role": "user", "content": one})], add_generation_prompt=True) for one in turns]
    label = "chat prompts (chat template)" if template.exists else "chat prompts"
    sets.append(TextSet(label, tuple(turns), divergence=True))
    return sets


def _examples(name: str, log: Callable[[str], None]) -> list[Example]:
    return [one for split in load_examples(str(fetch_asset(name, log))).splits.values() for one in split]
