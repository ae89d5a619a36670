"""Sampled answers of the policy: `kit.generate` under any route, with draws that belong to each answer.

A token is drawn by inverting the distribution's cumulative sum at one uniform number. The numbers follow from seed,
step, the prompt's key and the sample alone: an answer's draws are the same whatever is in its batch, however rows are
cut into chunks, whatever was drawn before. The global random state is neither read nor changed. Nothing of the model's
generation config is in force: transformers would fill what is open (top_k 50). It knows no reward, loss and
log-probability: answers are scored by a second pass over `Rollout.encode()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.errors import ConfigError, Errors, TrainingDiverged
from kitout.evaluate.ask.batches import ProgressFn, map_batches
from kitout.evaluate.ask.decoding import answer_ids, decode_answers, plan_decoding, takes_rows
from kitout.kit import Kit
from kitout.route import RouteEntry
from kitout.train.loop.step import combine_seeds


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn. The defaults draw from the model's own distribution, unchanged.

    With another temperature every log-probability of the answers has to be taken of logits divided by it; with top_p or
    top_k the answers come from a distribution that no log-probability of the model describes (a bias).
    """

    temperature: float = 1.0
    """Logits are divided by it; above 0."""
    top_p: float = 1.0
    """The smallest set of likeliest tokens with this probability; 1: all tokens."""
    top_k: int = 0
    """The likeliest so many tokens; 0: all tokens."""
    max_new_tokens: int = 128
    """Tokens of an answer at most, its end token included."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end an answer, besides those of the model's generation config and of the tokenizer: what the chat
    template writes behind a turn."""

    def __post_init__(self) -> None:
        errors = Errors(ConfigError, "sampling")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            errors.add(f"temperature is {self.temperature}, expected a number above 0; 1 is the model's own")
        if not 0 < self.top_p <= 1:
            errors.add(f"top_p is {self.top_p}, expected a number above 0 and at most 1; 1 keeps all tokens")
        if self.top_k < 0:
            errors.add(f"top_k is {self.top_k}, expected at least 0; 0 keeps all tokens")
        if self.max_new_tokens < 1:
            errors.add(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")
        errors.raise_if_any()


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled answer behind its prompt."""

    prompt_index: int
    """Which of the prompts it answers."""
    input_ids: tuple[int, ...]
    """Prompt and answer, without padding; the token that ended the answer is its last."""
    prompt_length: int
    """How many of the ids are the prompt."""
    ended: bool
    """An end token was drawn. False: it was cut at the longest allowed length."""
    text: str
    """The answer without special tokens and surrounding white space, as reward functions take it."""

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """The drawn tokens, the end token included."""
        return self.input_ids[self.prompt_length :]

    def to_values(self) -> dict[str, Any]:
        """As plain values, for a checkpoint in the middle of a round of answers."""
        return asdict(self)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Rollout:
        """What `to_values` gave, also after JSON."""
        return cls(**{**values, "input_ids": tuple(values["input_ids"])})

    def encode(self, location: str = "") -> EncodedExample:
        """As a row of training, with every drawn token as a target and nothing else."""
        labels = (IGNORE_INDEX,) * self.prompt_length + self.answer_ids
        return EncodedExample(
            self.input_ids, labels, prompt_length=self.prompt_length, reference=self.text, location=location
        )


def sample_answers(
    kit: Kit,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    *,
    seed: int,
    step: int,
    samples: int = 1,
    keys: Sequence[int] | None = None,
    routes: Sequence[RouteEntry] | None = None,
    chunk_size: int = 32,
    on_progress: ProgressFn | None = None,
) -> list[Rollout]:
    """`samples` answers to each prompt, those of a prompt together, in the order of the prompts.

    prompts: token ids, as the chat template or the tokenizer gives them. seed, step, keys: what the draws follow from,
    by prompt; keys: None: the prompt's position. Processes that share a step give each prompt the key that it has among
    all of them. routes: by prompt the adapters that answer it, as rows of one batch where they can be; None: what is
    active. chunk_size: rows of one call at most, halved while memory runs out; no draw depends on it, but the last bits
    of a model's logits may, so a run that is to be repeated to the bit keeps it.

    Dropout is off. ConfigError for a model that cannot generate or that reads prompts with an encoder, and for a prompt
    longer than it reads. TrainingDiverged where logits are not finite. Source: inverse transform sampling.
    """
    if kit.config.is_encoder_decoder:
        raise ConfigError(f"{type(kit.base).__name__} reads prompts with an encoder: sample from a decoder")
    errors = Errors(ConfigError, "sampling")
    if samples < 1:
        errors.add(f"samples is {samples}, expected at least 1 per prompt")
    for name, values in (("keys", keys), ("routes", routes)):
        if values is not None and len(values) != len(prompts):
            errors.add(f"{len(values)} {name} for {len(prompts)} prompts: give one per prompt")
    errors.raise_if_any()
    keys = range(len(prompts)) if keys is None else keys
    draws = [
        np.random.default_rng(combine_seeds(seed, step, key)).random((samples, settings.max_new_tokens)) for key in keys
    ]
    rows = [
        _Row(i, tuple(prompt), draws[i][sample], None if routes is None else routes[i])
        for i, prompt in enumerate(prompts)
        for sample in range(samples)
    ]
    distinct = None if routes is None else tuple(dict.fromkeys(routes))
    decoding = plan_decoding(kit, tokenizer, prompts, settings.max_new_tokens, distinct, settings.stop_ids)

    def ask(chunk: list[_Row]) -> list[list[int]]:
        def draw_for(numbers: list[int]) -> Mapping[str, Any]:
            uniforms = torch.from_numpy(np.stack([chunk[i].draws for i in numbers]))
            return {"logits_processor": [TokenDraws(uniforms, settings)]}

        by_row = None if distinct is None else [row.route for row in chunk]
        return answer_ids(kit, [row.prompt for row in chunk], by_row, decoding, draw_for, share_prompts=True)

    answers: dict[int, list[int]] = {}
    with decoding.active(kit, kept=()):
        for group in _groups(kit, rows, distinct):
            done = len(answers)
            progress = None if on_progress is None else _shifted(on_progress, done, len(rows))
            found = map_batches([rows[i] for i in group], chunk_size, ask, progress)
            answers |= zip(group, found, strict=True)
    by_row = [answers[i] for i in range(len(rows))]
    texts = decode_answers(tokenizer, by_row, decoding.stop_ids)
    return [
        Rollout(row.index, (*row.prompt, *ids), len(row.prompt), ids[-1] in decoding.stop_ids, text)
        for row, ids, text in zip(rows, by_row, texts, strict=True)
    ]


class TokenDraws:
    """A logits processor after which the greedy token is the drawn one: it is set to infinity.

    `generate` then decodes greedily, so it neither draws itself nor adds settings of its own.
    """

    def __init__(self, uniforms: Tensor, settings: SamplingSettings) -> None:
        """uniforms [rows, most new tokens], float64 in [0, 1): one number per token."""
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        self.uniforms, self.temperature, self.position = uniforms, settings.temperature, 0
        self.warpers: list[Callable[[Any, Tensor], Tensor]] = []
        if settings.top_k:
            self.warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self.warpers.append(TopPLogitsWarper(settings.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [rows, vocabulary], float32: the same with each row's drawn token at infinity."""
        logits = scores / self.temperature
        for warp in self.warpers:
            logits = warp(input_ids, logits)
        cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        if not bool(total.isfinite().all()):
            raise TrainingDiverged(
                "logits are not finite while answers are sampled: go back to a checkpoint, lower the learning rate"
            )
        uniform = self.uniforms[:, self.position : self.position + 1].to(scores.device)
        self.position += 1
        # Right of the sum: a token without probability is never the first whose sum exceeds the number.
        token = torch.searchsorted(cumulative, uniform * total, right=True).clamp(max=scores.shape[-1] - 1)
        return scores.scatter(1, token, math.inf)


@dataclass(frozen=True)
class _Row:
    """One answer to sample; as long as its prompt, so that alike lengths go together."""

    index: int
    """Of the prompt."""
    prompt: tuple[int, ...]
    """Its ids."""
    draws: np.ndarray[Any, np.dtype[np.float64]]
    """One uniform number per new token."""
    route: RouteEntry
    """The adapters that answer; None stands for the base, or for what is active where nobody gave routes."""

    def __len__(self) -> int:
        return len(self.prompt)


def _groups(kit: Kit, rows: Sequence[_Row], routes: Sequence[RouteEntry] | None) -> list[list[int]]:
    """Numbers of the rows that may share a batch: all, or those of one route where a model or adapter takes no rows."""
    if routes is None or len(routes) == 1 or takes_rows(kit, routes):
        return [list(range(len(rows)))]
    return [[i for i, row in enumerate(rows) if row.route == route] for route in routes]


def _shifted(on_progress: ProgressFn, done: int, total: int) -> ProgressFn:
    return lambda done_here, _: on_progress(done + done_here, total)
