"""(h) What evaluation costs: eight adapters together against one after the other, and choices against their tokens.

Eight LoRAs r 8 on 10 layers of SmolLM2's shape, random values. Generation: 8 prompts of 16 tokens, 16 new ones each.
Likelihood: questions with four choices of 4 tokens, of one row and more, of 16 tokens and more. The cost of choices is
against the plain forward of their distinct tokens (every question once and its choices), in batches of a suite's size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from common import SMOL, Line, interleaved
from transformers import LlamaForCausalLM

import kitout
from kitout import Kit, LoRA
from kitout.base.eval_mode import eval_mode
from kitout.evaluate.ask.generate import generate_under
from kitout.evaluate.ask.token_likelihood import Prompted, TokenScorer

NUM_ADAPTERS, NEW_TOKENS, ANSWER_TOKENS, CHOICES = 8, 16, 4, 4
SIZES = ((1, 16), (1, 64), (4, 64), (8, 128))
FULL_BATCHES = ((32, 32), (32, 64), (8, 128))  # as the questions of a suite come


class Words:
    """The little that generation asks of a tokenizer."""

    pad_token_id, eos_token_id = 0, None

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


def run(rounds: int = 5) -> list[Line]:
    kit, names = filled()
    prompts = [torch.randint(1, 40000, (16,)).tolist() for _ in range(8)]

    def together() -> object:
        return generate_under(kit, Words(), prompts, NEW_TOKENS, names, batch_size=8 * NUM_ADAPTERS)

    def apart() -> object:
        return [generate_under(kit, Words(), prompts, NEW_TOKENS, [name], batch_size=8) for name in names]

    times = interleaved({"together": together, "apart": apart}, rounds)
    ratio = times.ratio("together", "apart")
    detail = f"{times.best('together'):.2f} s for 8 prompts x 8 adapters x 16 tokens"
    lines = [
        Line("8 adapters generate together, against 8 passes", times.ratio_text("together", "apart"), "<= 0.50 x",
             ratio <= 0.5, detail)
    ]  # fmt: skip
    for rows, tokens in SIZES:
        items = [item(tokens) for _ in range(rows)]
        cases = {"joint": scored(kit, names, items), "apart": one_by_one(kit, names, items)}
        times = interleaved(cases, max(rounds, 3) if rows * tokens <= 64 else rounds)  # of small ones one is noise
        ratio = times.ratio("joint", "apart")
        label = f"8 adapters' likelihoods of 4 choices, {rows} x {tokens} tokens, against 8 passes"
        lines.append(Line(label, times.ratio_text("joint", "apart"), "<= 1.00 x", ratio <= 1.0))
    for rows, tokens in FULL_BATCHES:
        items = [item(tokens) for _ in range(rows)]
        times = interleaved({"choices": scored(kit, [None], items), "forward": plain(kit, items)}, max(rounds, 2))
        label = f"4 choices, {rows} x {tokens} tokens, against a forward of their distinct tokens"
        ratio = times.ratio("choices", "forward")
        lines.append(Line(label, times.ratio_text("choices", "forward"), "<= 1.20 x", ratio <= 1.2))
    return lines


def filled() -> tuple[Kit, list[str]]:
    torch.manual_seed(0)
    config = copy.deepcopy(SMOL)
    config.num_hidden_layers = 10
    kit = kitout.attach(LlamaForCausalLM(config).eval())
    names = [f"a{i}" for i in range(NUM_ADAPTERS)]
    for i, name in enumerate(names):
        kit.add(name, LoRA(rank=8, targets="all-linear"), seed=i)
        with torch.no_grad():
            for p in kit[name].parameters():
                p.normal_(0.0, 0.02)
    return kit.eval(), names


def item(tokens: int) -> Prompted:
    def ids(number: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, 40000, (number,)).tolist())

    return Prompted(ids(tokens), tuple(ids(ANSWER_TOKENS) for _ in range(CHOICES)))


def scored(kit: Kit, names: Sequence[str | None], items: list[Prompted]) -> Callable[[], object]:
    def call() -> object:
        scorer = TokenScorer(kit, names)
        with eval_mode(kit.base, kit):
            return scorer.under_each(
                sum(one.num_tokens for one in items), lambda routes: scorer.answer_scores(routes, items)
            )

    return call


def one_by_one(kit: Kit, names: Sequence[str], items: list[Prompted]) -> Callable[[], object]:
    calls = [scored(kit, [name], items) for name in names]
    return lambda: [call() for call in calls]


@torch.no_grad()
def plain(kit: Kit, items: list[Prompted]) -> Callable[[], object]:
    """A forward of as many rows, each as long as a prompt with all of its choices, and logits where they are needed."""
    length = len(items[0].prompt) + CHOICES * (ANSWER_TOKENS - 1)
    ids = torch.randint(1, 40000, (len(items), length))

    @torch.no_grad()
    def call() -> object:
        return kit.base(input_ids=ids, logits_to_keep=1 + CHOICES * (ANSWER_TOKENS - 1), use_cache=False)

    return call
