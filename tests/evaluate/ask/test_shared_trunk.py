"""Adapters above a common trunk are asked as ever, and what they share runs once for each batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import kitout
from kitout import Kit, LoRA, PrefixTuning, fast
from kitout.evaluate.ask.choices import ChoicePrompt, ChoiceQuestion, choice_likelihoods
from kitout.evaluate.ask.shared_trunk import SharedTrunk
from kitout.evaluate.ask.text_likelihood import text_likelihoods
from kitout.evaluate.ask.token_likelihood import Prompted, TokenScorer
from kitout.evaluate.metrics.texts import TextSums
from zoo import ZOO, tokenizer_of

TEXTS = ["Hello, world", "It rained. " * 5, "é ü", "a longer text about nothing at all"]


def build(layers: str = "last:1", species: str = "llama") -> tuple[Kit, Any]:
    kit = kitout.attach(ZOO[species].build().double())
    for seed, name in enumerate("abc"):
        adapter = kit.add(name, LoRA(rank=2, layers=layers), seed=seed, dtype=torch.float64)
        with torch.no_grad():
            for value in adapter.parameters():
                value.add_(0.3 * torch.randn_like(value))
    return kit, tokenizer_of(ZOO[species])


def rows_of_first_block(kit: Kit) -> list[int]:
    rows: list[int] = []
    linear = next(m for m in kit.base.get_submodule(kit.survey.blocks[0].path).modules() if isinstance(m, nn.Linear))
    linear.register_forward_hook(lambda _module, args, _output: rows.append(args[0].shape[0]))
    return rows


def ask(kit: Kit, tokenizer: Any) -> list[list[TextSums]]:
    return text_likelihoods(kit, tokenizer, TEXTS, [None, "a", "b", "c"], divergence=True)


@pytest.mark.parametrize("joined", ["1000000", "0"])
@pytest.mark.parametrize("species", ["llama", "gpt-neox"])
def test_shared_blocks_run_once(species: str, joined: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITOUT_JOINED_TOKENS", joined)
    kit, tokenizer = build(species=species)
    with fast.disabled():
        expected = ask(kit, tokenizer)
    trunk = SharedTrunk.find(kit, [None, "a"])
    assert trunk is not None
    assert trunk.entry.cut == kit.survey.blocks[1].path
    rows = rows_of_first_block(kit)
    found = ask(kit, tokenizer)
    for one, other in zip(found, expected, strict=True):
        assert [s.nll for s in one] == pytest.approx([s.nll for s in other], rel=1e-10)
        assert [s.divergence for s in one] == pytest.approx([s.divergence for s in other], abs=1e-10)
    tried = 1 + 1 + 3  # the probe, what is recorded of it, and the whole model under each
    assert len(rows) == tried + 1  # a batch holds all windows
    assert rows[-1] == len(TEXTS)


@pytest.mark.parametrize("choices", [("a", "b"), ("a", "xyz")])
def test_choices_behind_prompts_padded_on_the_left(choices: tuple[str, ...]) -> None:
    """Answers of one token need no cache; behind others the skipped blocks would owe their keys, so they all run."""
    kit, tokenizer = build()
    questions = [ChoiceQuestion(f"Is it {'so ' * i}?", choices, 0) for i in range(4)]

    def scores() -> list[float]:
        prompt = ChoicePrompt(template="{question}", delimiter="")
        found = choice_likelihoods(kit, tokenizer, questions, [None, "a", "b"], prompt=prompt)
        return [value for of_name in found for sums in of_name for value in sums.log_likelihoods]

    with fast.disabled():
        expected = scores()
    rows = rows_of_first_block(kit)
    assert scores() == pytest.approx(expected, rel=1e-10)
    asked = rows[4:]  # behind what was tried
    assert asked == [4] if choices[1] == "b" else sum(asked) > 12


def test_nothing_is_shared_where_the_first_block_differs() -> None:
    kit, _ = build(layers="all")
    assert SharedTrunk.find(kit, [None, "a"]) is None
    kit, _ = build()
    kit.add("p", PrefixTuning(length=2))
    assert SharedTrunk.find(kit, ["a", "p"]) is None
    assert SharedTrunk.find(kit, ["a"]) is None
    assert SharedTrunk.find(kit, [None]) is None
    with fast.disabled():
        assert SharedTrunk.find(kit, ["a", "b"]) is None
    kit, _ = build(species="t5") if "t5" in ZOO else build()
    assert SharedTrunk.find(kit, ["a", "b"]) is None


def test_batches_that_are_asked_route_by_route_share_it_too() -> None:
    """As those whose rows are too many to be joined."""
    kit, _ = build()
    scorer = TokenScorer(kit, [None, "a", "b", "c"])
    scorer.can_join = False
    items = [Prompted((1, 2, 3), ((4 + i, 5),)) for i in range(5)]

    def ask() -> list[torch.Tensor]:
        run = lambda routes: [scorer.row_logits([routes[0]] * len(items), items).log_probs()]  # noqa: E731
        with torch.no_grad():
            return scorer.under_each(25, run)

    with fast.disabled():
        expected = ask()
    scorer = TokenScorer(kit, [None, "a", "b", "c"])
    scorer.can_join = False
    rows = rows_of_first_block(kit)
    torch.testing.assert_close(ask(), expected, rtol=1e-10, atol=1e-10)
    assert rows.count(len(items)) == 1
