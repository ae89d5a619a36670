"""Answers to one prompt get the same log-probabilities and gradients whether it runs once or with each of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kitout import IA3, Houlsby, Kit, LoRA, PrefixTuning
from kitout.align.objectives import scored_answers
from kitout.align.objectives.scored_answers import AnswerScorer
from kitout.align.objectives.shared_prompts import SharedPrompts
from kitout.align.rounds import answer_row
from kitout.data.encode.item import EncodedExample
from kitout.train.loop.base_mode import training_mode
from train.fixtures import add, kit_of
from zoo import VOCAB

METHODS = {
    "LoRA": LoRA(rank=2, targets="all-linear"), "DoRA": LoRA(rank=2, dora=True), "IA3": IA3(),
    "Houlsby": Houlsby(width=6),
}  # fmt: skip


def rows_of(samples: int = 4) -> list[EncodedExample]:
    """Answers of several lengths to prompts of several lengths; one of them is not trained on."""
    draw = torch.Generator().manual_seed(0)
    ids = lambda n: tuple(torch.randint(5, VOCAB, (n,), generator=draw).tolist())  # noqa: E731
    rows = [
        answer_row((*prompt, *ids(2 + s)), len(prompt), is_trained=(s, len(prompt)) != (1, 12))
        for prompt in map(ids, (12, 9, 10))
        for s in range(samples)
    ]
    return rows[::2] + rows[1::2]


def scored(kit: Kit, may_share: bool) -> tuple[AnswerScorer, Tensor, Tensor, dict[str, Tensor]]:
    scorer = AnswerScorer(kit, 0.7, may_share=may_share)
    with kit.use("policy"):
        scorer.choose(["policy"], rows_of()[:2])
        batch = scorer.collate(rows_of())
        log_probs, entropy = scorer(kit, batch)
        (log_probs * torch.linspace(-1, 1, len(log_probs))).sum().backward()
    grads = {name: value.grad.clone() for name, value in kit["policy"].named_parameters() if value.grad is not None}
    kit.zero_grad()
    assert scorer.shares_prompts == may_share
    assert (batch.shared is not None) == may_share
    return scorer, log_probs.detach(), entropy, grads


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("species", ["llama", "gpt2"])
@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_that_runs_once_changes_nothing(name: str, species: str, attention: str) -> None:
    kit = kit_of(species, dtype=torch.float64)
    kit.base.set_attn_implementation(attention)  # type: ignore[operator]
    add(kit, "policy", METHODS[name], seed=0)
    kit.train_only("policy")
    _, alone, entropy_alone, grads_alone = scored(kit, False)
    _, shared, entropy, grads = scored(kit, True)
    tolerance = 1e-6 if species == "llama" else 1e-11  # its norms, rotations and softmax are of float32
    torch.testing.assert_close(shared, alone, rtol=0, atol=tolerance)
    torch.testing.assert_close(entropy, entropy_alone, rtol=0, atol=tolerance)
    assert grads.keys() == grads_alone.keys()
    assert all(value.isfinite().all() for value in grads.values())
    torch.testing.assert_close(grads, grads_alone, rtol=0, atol=10 * tolerance)


def test_virtual_tokens_and_checkpointed_blocks_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kit = kit_of("llama", dtype=torch.float64)
    add(kit, "prefix", PrefixTuning(length=3), seed=0)
    scorer = AnswerScorer(kit, may_share=True)
    with kit.use("prefix"):
        scorer.choose(["prefix"], rows_of()[:2])
    assert not scorer.shares_prompts

    add(kit, "policy", METHODS["LoRA"], seed=0)
    with kit.use("policy"):
        scorer.choose(["policy"], rows_of()[:2])
        assert scorer.shares_prompts
        expected, _ = scorer(kit, scorer.collate(rows_of()))
        monkeypatch.setattr(scored_answers.SharedPrompts, "log_probs", lambda *_: None)  # no cache came back
        found, _ = scorer(kit, scorer.collate(rows_of()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_activation_checkpointing_gives_the_same() -> None:
    kit = kit_of("llama", dtype=torch.float64)
    add(kit, "policy", METHODS["LoRA"], seed=0)
    kit.train_only("policy")
    *_, expected = scored(kit, False)
    scorer = AnswerScorer(kit, 0.7, may_share=True)
    with kit.use("policy"):
        scorer.choose(["policy"], rows_of()[:2])
    with training_mode(kit, ["policy"], activation_checkpointing=True), kit.use("policy"):
        log_probs, _ = scorer(kit, scorer.collate(rows_of()))
        (log_probs * torch.linspace(-1, 1, len(log_probs))).sum().backward()
    for name, value in kit["policy"].named_parameters():
        torch.testing.assert_close(value.grad, expected[name], rtol=0, atol=1e-6)


def test_rows_that_would_save_little_run_whole() -> None:
    device = torch.device("cpu")
    rows = [answer_row(tuple(range(5, 25)), 3), answer_row((*range(5, 24), 6), 3)]
    assert SharedPrompts.of(rows, device) is None
    assert SharedPrompts.of([answer_row((5, 6, 7), 1)] * 4, device) is None
    assert SharedPrompts.of([answer_row((5, 6, 7), 2)], device) is None
    assert SharedPrompts.of([answer_row(tuple(range(5, 30)), 20)] * 4, device) is not None
