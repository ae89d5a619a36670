"""Questions with choices, asked of base and adapters: the log-likelihood of every choice behind its question.

Read, tokenized and truncated as lm-evaluation-harness does: the likeliest choice gives its `acc`, the likeliest per
character its `acc_norm`. The question is computed once for all of its choices. Nothing is generated, and no end token
is added (`label_likelihood.py` adds one where a label begins another). It knows no data sets and no metrics' formulas.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kitout.base.eval_mode import eval_mode
from kitout.data.encode.chat_template import ChatTemplate
from kitout.data.encode.spans_to_labels import SpanTokenizer
from kitout.data.examples.examples import Turn
from kitout.errors import ConfigError, Errors
from kitout.evaluate.ask.batches import ProgressFn, map_batches
from kitout.evaluate.ask.harness_tokens import encode_pairs
from kitout.evaluate.ask.text_limit import window_tokens
from kitout.evaluate.ask.token_likelihood import Prompted, TokenScorer
from kitout.evaluate.metrics.choice_accuracy import ChoiceSums
from kitout.kit import Kit
from kitout.route import RouteEntry

MAX_SHOWN_ERRORS = 5  # reported one by one
SLOT = "{question}"


@dataclass(frozen=True)
class ChoiceQuestion:
    """One row."""

    question: str
    """What is asked."""
    choices: tuple[str, ...]
    """The answers to choose from, at least two."""
    answer: int
    """The index of the right one."""


@dataclass(frozen=True)
class ChoicePrompt:
    """How a question is put."""

    template: str = f"Question: {SLOT}\nAnswer:"
    """The text before a choice, {question} in it."""
    delimiter: str = " "
    """Between that and a choice."""
    as_chat: bool = False
    """Whether the text is a user's turn, by the tokenizer's chat template, and a choice the answer to it."""

    def __post_init__(self) -> None:
        if SLOT not in self.template:
            raise ConfigError(f"the template {self.template!r} has no {SLOT}: write it where the question belongs")

    @property
    def label(self) -> str:
        """What the prompts are called in a report."""
        return "chat template" if self.as_chat else "plain"


PLAIN = ChoicePrompt()
CHAT = ChoicePrompt(delimiter="", as_chat=True)  # the template writes what stands before an answer


def read_choices(
    rows: Iterable[Mapping[str, Any]], where: str = "choices", places: Sequence[str] | None = None
) -> list[ChoiceQuestion]:  # fmt: skip
    """Rows with question, choices (a list of texts) and answer (an index, from 0). ConfigError with all that are not.

    where: what the rows are of, for the message. places: where each one is, "a.jsonl line 3"; default: its number from
    1.
    """
    errors, questions = Errors(ConfigError, where), []
    for number, row in enumerate(rows):
        place = f"row {number + 1}" if places is None else places[number]
        choices, answer = row.get("choices"), row.get("answer")
        if isinstance(answer, str) and answer.strip().isdecimal():  # as a csv has it
            answer = int(answer)
        if not isinstance(row.get("question"), str) or not row["question"].strip():
            errors.add(f"{place} has the question {row.get('question')!r}, expected a text")
        elif not isinstance(choices, list | tuple) or len(choices) < 2 or not all(
            isinstance(choice, str) and choice.strip() for choice in choices
        ):  # fmt: skip
            errors.add(f"{place} has the choices {str(choices)[:80]}, expected a list of at least two texts")
        elif not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
            errors.add(f"{place} has the answer {answer!r}, expected an index from 0 to {len(choices) - 1}")
        else:
            questions.append(ChoiceQuestion(row["question"], tuple(choices), answer))
    errors.shorten(MAX_SHOWN_ERRORS, "rows")
    errors.raise_if_any()
    return questions


def choice_likelihoods(
    kit: Kit,
    tokenizer: Any,
    questions: Sequence[ChoiceQuestion],
    names: Sequence[RouteEntry] | None = None,
    *,
    prompt: ChoicePrompt = PLAIN,
    max_length: int | None = None,
    batch_size: int = 256,
    on_progress: ProgressFn | None = None,
) -> list[list[ChoiceSums]]:
    """For each name the log-likelihoods of every question's choices, in order.

    `compute_measures("choice", sums, [q.answer for q in questions])` makes acc and acc_norm of them. names: adapters,
    and None for the base; none given: what is active. Several share a batch, as rows, where it is small. max_length:
    tokens of question and choice, those in front are left out; default: what the model reads under every one of the
    names. batch_size: questions in one batch, at most; halved while memory runs out. ConfigError where a choice has no
    token of its own or more than the model reads, or the tokenizer no chat template that the prompt asks for.
    """
    scorer = TokenScorer(kit, names)
    items, limit = _encode_checked(scorer, tokenizer, questions, prompt, max_length)
    # A prompt that is cut differs from choice to choice: these are items of their own.
    parts: list[Prompted] = []
    for item in items:
        if kit.config.is_encoder_decoder:  # which reads them apart
            parts.append(Prompted(item.prompt[-limit:], item.answers))
        elif len(item.prompt) + max(map(len, item.answers)) - 1 <= limit:
            parts.append(item)
        else:
            parts += [_cut(item.prompt, answer, limit) for answer in item.answers]

    def ask(batch: list[Prompted]) -> list[list[list[float]]]:
        """By item and route: the scores of its answers."""

        def run(routes: Sequence[RouteEntry]) -> list[list[list[float]]]:
            return scorer.answer_scores(routes, batch)

        by_route = scorer.under_each(sum(item.num_tokens for item in batch), run)
        return [[of_route[i] for of_route in by_route] for i in range(len(batch))]

    with eval_mode(kit.base, kit):
        found = iter(map_batches(parts, batch_size, ask, on_progress, scorer.prompt_tokens))
    results: list[list[ChoiceSums]] = [[] for _ in scorer.routes]
    for question in questions:
        scores: list[list[float]] = [[] for _ in scorer.routes]
        while len(scores[0]) < len(question.choices):
            for of_route, new in zip(scores, next(found), strict=True):
                of_route += new
        for result, of_route in zip(results, scores, strict=True):
            result.append(ChoiceSums(tuple(of_route), tuple(map(len, question.choices))))
    return results


def check_choices(
    kit: Kit, tokenizer: Any, questions: Sequence[ChoiceQuestion], names: Sequence[RouteEntry] | None = None, *,
    prompt: ChoicePrompt = PLAIN, max_length: int | None = None,
) -> None:  # fmt: skip
    """ConfigError where `choice_likelihoods` would raise one, without asking the model anything."""
    _encode_checked(TokenScorer(kit, names), tokenizer, questions, prompt, max_length)


def _encode_checked(
    scorer: TokenScorer, tokenizer: Any, questions: Sequence[ChoiceQuestion], prompt: ChoicePrompt,
    max_length: int | None,
) -> tuple[list[Prompted], int]:  # fmt: skip
    """The questions as ids, and how many tokens the model reads at once under every route."""
    items = _encode(scorer.kit, tokenizer, questions, prompt)
    longest = max((len(item.prompt) + len(a) - 1 for item in items for a in item.answers), default=1)
    limit = window_tokens(scorer.kit, tokenizer, scorer.routes if scorer.switches else None, max_length or longest)
    _check_lengths(items, limit)
    return items, limit


def _encode(kit: Kit, tokenizer: Any, questions: Sequence[ChoiceQuestion], prompt: ChoicePrompt) -> list[Prompted]:
    template = None
    if prompt.as_chat:
        template = ChatTemplate(SpanTokenizer(tokenizer))
        if not template.exists:
            raise ConfigError(f"{type(tokenizer).__name__} has no chat template: ask by plain prompts")
    errors, items = Errors(ConfigError, "choices"), []
    for number, question in enumerate(questions):
        text = prompt.template.replace(SLOT, question.question)
        if template is not None:
            text = template.render([Turn({"role": "user", "content": text})], add_generation_prompt=True)
        answers = [prompt.delimiter + choice for choice in question.choices]
        ids, of_answers = encode_pairs(tokenizer, text, answers, bool(kit.config.is_encoder_decoder))
        empty = next((k for k, answer in enumerate(of_answers) if not answer), None)
        if empty is not None:
            errors.add(f"question {number}: choice {empty} ({question.choices[empty]!r}) has no token of its own")
        items.append(Prompted(tuple(ids), tuple(map(tuple, of_answers))))
    errors.raise_if_any()
    return items


def _check_lengths(items: Sequence[Prompted], limit: int) -> None:
    errors = Errors(ConfigError, "choices")
    for number, item in enumerate(items):
        longest = max(map(len, item.answers))
        if longest > limit:
            errors.add(f"question {number} has a choice of {longest:,} tokens, and the model reads {limit:,}")
    errors.shorten(MAX_SHOWN_ERRORS, "questions")
    errors.raise_if_any()


def _cut(prompt: Sequence[int], answer: Sequence[int], limit: int) -> Prompted:
    """As much of the end as fits: the last token of the answer is scored and not read."""
    room = max(1, limit + 1 - len(answer))
    return Prompted(tuple(prompt[-room:]), (tuple(answer),))
