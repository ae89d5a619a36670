"""Losses of preferences, their gradients and metrics against TRL's own methods, and where numbers are extreme."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from align.losses.trl_stand_in import (
    GivenOutput,
    TokenTable,
    check_close,
    gradients,
    logged,
    owners_of,
    pad_rows,
    stand_in,
    trainer_class,
)
from kitout.align.losses.preference import (
    chosen_and_rejected,
    dpo_loss,
    kto_loss,
    kto_reference_point,
    log1mexp,
    orpo_loss,
    reward_loss,
    sequence_log_ratios,
    simpo_loss,
)
from kitout.data.by_row import mean_by_row
from kitout.errors import ConfigError

LENGTHS = [3, 7, 1, 2, 5, 5, 4, 1]  # of the answers, pair after pair
OWNERS = owners_of(LENGTHS)
ROWS, WIDTH = len(LENGTHS), max(LENGTHS)


def log_probs(seed: int, size: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = -torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64) * 3 * size
    return values.to(dtype).requires_grad_()


def completions(order: list[int]) -> dict[str, Tensor]:
    """Input ids that name a row of the table, one token of prompt, then the answer."""
    mask = torch.tensor([[0] + [1] * LENGTHS[r] + [0] * (WIDTH - LENGTHS[r]) for r in order])
    return {
        "input_ids": torch.tensor(order)[:, None].expand(-1, WIDTH + 1).contiguous(),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
    }


def trl_dpo(policy: Tensor, reference: Tensor, rows: list[int], **settings: Any) -> tuple[Tensor, dict[str, float]]:
    dpo_trainer = trainer_class("DPOTrainer")

    settings = {"beta": 0.1, "label_smoothing": 0.0} | settings
    kind = settings.pop("kind")
    model = TokenTable(pad_rows(policy, LENGTHS)).train()
    me = stand_in(
        dpo_trainer,
        model=model,
        ref_model=TokenTable(pad_rows(reference, LENGTHS)),
        args={"gradient_checkpointing_kwargs": None},
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        use_weighting=False,
        **settings,
    )
    return dpo_trainer._compute_loss(me, model, completions(rows[0::2] + rows[1::2]), False), logged(me)


@pytest.mark.parametrize("size", [1.0, 50.0], ids=["near", "far"])
@pytest.mark.parametrize("beta", [0.05, 0.1, 1.5])
@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_dpo_is_trl(kind: Any, beta: float, size: float) -> None:
    policy, reference = log_probs(0, size), log_probs(1, size).detach()
    theirs, metrics = trl_dpo(policy, reference, list(range(ROWS)), kind=kind, beta=beta)
    chosen, rejected = chosen_and_rejected(sequence_log_ratios(policy, reference, OWNERS, ROWS))
    losses, ours = dpo_loss(chosen, rejected, kind, beta=beta, lengths=chosen_and_rejected(torch.tensor(LENGTHS)))
    assert losses.shape == (ROWS // 2,)
    check_close(losses.mean(), theirs, 1e-10)
    check_close(gradients(losses.mean(), policy)[0], gradients(theirs, policy)[0], 1e-10)
    for name, trl_name in {
        "chosen_reward": "chosen",
        "rejected_reward": "rejected",
        "margin": "margins",
        "accuracy": "accuracies",
    }.items():
        assert not ours[name].requires_grad
        check_close(ours[name].mean(), metrics[f"rewards/{trl_name}"])


@pytest.mark.parametrize("label_smoothing", [0.1, 0.4])
def test_conservative_dpo_is_trl(label_smoothing: float) -> None:
    """Its loss of sorted pairs, which is cDPO where there is one pair to sort."""
    policy, reference = log_probs(0), log_probs(1).detach()
    chosen, rejected = chosen_and_rejected(sequence_log_ratios(policy, reference, OWNERS, ROWS))
    losses, _ = dpo_loss(chosen, rejected, beta=0.3, label_smoothing=label_smoothing)
    for pair, loss in enumerate(losses):
        rows = [2 * pair, 2 * pair + 1]
        theirs, _ = trl_dpo(policy, reference, rows, kind="aot", beta=0.3, label_smoothing=label_smoothing)
        check_close(loss, theirs, 1e-10)
        grads = [torch.autograd.grad(each, policy, retain_graph=True)[0] for each in (loss, theirs)]
        check_close(*grads, 1e-10)


@pytest.mark.parametrize(
    ("beta", "weights", "labels"),
    [
        (0.1, (1.0, 1.0), [1, 0, 1, 1, 0, 0, 1, 0]),
        (0.5, (1.33, 0.7), [0, 0, 1, 0, 0, 0, 1, 0]),
        (2.0, (1.0, 2.0), [1] * 8),
    ],
)
@pytest.mark.parametrize("mismatched_is_likelier", [True, False])
def test_kto_is_trl(beta: float, weights: tuple[float, float], labels: list[int], mismatched_is_likelier: bool) -> None:
    kto_trainer = trainer_class("KTOTrainer")

    policy, reference = log_probs(0), log_probs(1).detach()
    shift = 1.0 if mismatched_is_likelier else -1.0
    other, other_reference = log_probs(2).detach(), log_probs(3).detach() - shift
    model = TokenTable(torch.cat([pad_rows(policy, LENGTHS), pad_rows(other, LENGTHS)])).train()
    me = stand_in(
        kto_trainer,
        ("_compute_kl_logps",),
        model=model,
        ref_model=TokenTable(torch.cat([pad_rows(reference, LENGTHS), pad_rows(other_reference, LENGTHS)])),
        args={"gradient_checkpointing_kwargs": None},
        calculate_KL=True,
        precompute_ref_logps=False,
        loss_type="kto",
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    batch = completions(list(range(ROWS)))
    batch |= {f"KL_{name}": value for name, value in batch.items()}
    batch["KL_input_ids"] = batch["KL_input_ids"] + ROWS
    batch["label"] = torch.tensor(labels, dtype=torch.bool)
    theirs = kto_trainer._compute_loss(me, model, batch, False)
    z = kto_reference_point(sequence_log_ratios(other, other_reference, OWNERS, ROWS))
    assert (z > 0) == mismatched_is_likelier
    losses, metrics = kto_loss(
        sequence_log_ratios(policy, reference, OWNERS, ROWS),
        batch["label"],
        z,
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    check_close(losses.mean(), theirs, 1e-10)
    check_close(gradients(losses.mean(), policy)[0], gradients(theirs, policy)[0], 1e-10)
    expected = logged(me)
    check_close(metrics["kl"].mean(), expected["kl"])
    assert torch.equal(metrics["rejected_reward"].isnan(), batch["label"])
    assert metrics["margin"].isfinite().all()
    check_close(metrics["chosen_reward"].nanmean(), expected["rewards/chosen"])
    if not all(labels):
        check_close(metrics["rejected_reward"].nanmean(), expected["rewards/rejected"])


VOCABULARY = 11


def paired_batch(lengths: list[int]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What the ORPO and CPO trainers are given (a prompt of one token), and each answer's ids, pair after pair."""
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths]
    batch = {}
    for side, name in enumerate(("chosen", "rejected")):
        answers = ids[side::2]
        width = 1 + max(map(len, answers))
        rows = torch.full((len(answers), width), 0)
        labels, mask = torch.full_like(rows, -100), torch.zeros_like(rows)
        for row, answer in enumerate(answers):
            rows[row, 1 : 1 + len(answer)] = labels[row, 1 : 1 + len(answer)] = answer
            mask[row, : 1 + len(answer)] = 1
        batch |= {f"{name}_input_ids": rows, f"{name}_labels": labels, f"{name}_attention_mask": mask}
    return batch, ids


def answer_means(logits: Tensor, ids: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean log-probability of each answer, from logits whose rows are the chosen answers and then the rejected."""
    lengths = [len(answer) for answer in ids]
    order = [*range(0, len(ids), 2), *range(1, len(ids), 2)]
    flat = [logits[order.index(r), :n].log_softmax(-1)[torch.arange(n), ids[r]] for r, n in enumerate(lengths)]
    return chosen_and_rejected(mean_by_row(torch.cat(flat), owners_of(lengths), len(ids)))


def random_logits(rows: int, width: int, size: float, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(rows, width, VOCABULARY, generator=generator, dtype=dtype) * size).requires_grad_()


def trl_pairs(trainer: type, logits: Tensor, batch: dict[str, Tensor], **settings: Any) -> tuple[Tensor, Any]:
    methods = tuple(name for name in ("concatenated_forward", "odds_ratio_loss", "cpo_loss") if name in vars(trainer))
    me = stand_in(trainer, methods, is_encoder_decoder=False, padding_value=0, pad_token_id=0, **settings)
    me.concatenated_inputs, me.get_batch_logps = trainer.concatenated_inputs, trainer.get_batch_logps
    return trainer.get_batch_loss_metrics(me, GivenOutput(logits), batch)


PAIRED_METRICS = {
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
    "nll": "nll_loss",
}


@pytest.mark.parametrize(
    "lengths", [[3, 7, 3, 1, 3, 5], [4, 2], [1, 6]], ids=["equal chosen lengths", "one pair", "one token"]
)
@pytest.mark.parametrize(("beta", "size"), [(0.1, 1.0), (0.7, 3.0), (1.0, 12.0)])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_orpo_is_trl(lengths: list[int], beta: float, size: float) -> None:
    """Its nll is a mean over the tokens of the micro-batch, so the chosen answers are of one length, or one alone."""
    orpo_trainer = trainer_class("ORPOTrainer", "trl.experimental.orpo")

    batch, ids = paired_batch(lengths)
    logits = random_logits(len(lengths), 1 + max(lengths), size, torch.float64)
    theirs, metrics = trl_pairs(orpo_trainer, logits, batch, beta=beta)
    losses, ours = orpo_loss(*answer_means(logits, ids), beta=beta)
    check_close(losses.mean(), theirs)
    check_close(gradients(losses.mean(), logits)[0], gradients(theirs, logits)[0])
    for name, trl_name in {**PAIRED_METRICS, "log_odds_ratio": "log_odds_chosen"}.items():
        assert not ours[name].requires_grad
        check_close(ours[name].mean(), metrics[trl_name])


@pytest.mark.parametrize("lengths", [[3, 7, 3, 1, 3, 5], [4, 2]], ids=["equal chosen lengths", "one pair"])
@pytest.mark.parametrize(
    ("beta", "gamma", "cpo_alpha", "size"), [(2.0, 0.5, 0.0, 1.0), (2.5, 1.2, 1.0, 1.0), (0.1, 0.5, 0.3, 20.0)]
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_simpo_is_trl(lengths: list[int], beta: float, gamma: float, cpo_alpha: float, size: float) -> None:
    cpo_trainer = trainer_class("CPOTrainer", "trl.experimental.cpo")

    batch, ids = paired_batch(lengths)
    logits = random_logits(len(lengths), 1 + max(lengths), size, torch.float64)
    settings = {"loss_type": "simpo", "alpha": 0.0, "label_smoothing": 0.0}
    theirs, metrics = trl_pairs(
        cpo_trainer, logits, batch, beta=beta, simpo_gamma=gamma, cpo_alpha=cpo_alpha, **settings
    )
    losses, ours = simpo_loss(*answer_means(logits, ids), beta=beta, gamma=gamma, cpo_alpha=cpo_alpha)
    check_close(losses.mean(), theirs, 1e-10)
    check_close(gradients(losses.mean(), logits)[0], gradients(theirs, logits)[0], 1e-10)
    for name, trl_name in PAIRED_METRICS.items():
        if name != "nll" or cpo_alpha:  # TRL leaves it out at 0
            check_close(ours[name].mean(), metrics[trl_name])


def test_simpo_with_any_lengths_is_trl() -> None:
    cpo_trainer = trainer_class("CPOTrainer", "trl.experimental.cpo")

    batch, ids = paired_batch(LENGTHS)
    logits = random_logits(ROWS, 1 + WIDTH, 1.0, torch.float64)
    settings = {"loss_type": "simpo", "alpha": 0.0, "label_smoothing": 0.0, "cpo_alpha": 0.0}
    theirs, _ = trl_pairs(cpo_trainer, logits, batch, beta=2.0, simpo_gamma=1.0, **settings)
    losses, _ = simpo_loss(*answer_means(logits, ids), beta=2.0, gamma=1.0)
    check_close(losses.mean(), theirs, 1e-10)
    check_close(gradients(losses.mean(), logits)[0], gradients(theirs, logits)[0], 1e-10)


@pytest.mark.parametrize("margins", [None, [0.5, 0.0, 2.0, -1.0]])
@pytest.mark.parametrize("centering", [None, 0.01, 3.0])
@pytest.mark.parametrize("size", [1.0, 200.0])
def test_reward_is_trl(margins: list[float] | None, centering: float | None, size: float) -> None:
    reward_trainer = trainer_class("RewardTrainer")

    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(8, generator=generator, dtype=torch.float64) * size).requires_grad_()
    chosen, rejected = chosen_and_rejected(scores)
    model = GivenOutput(torch.cat([chosen, rejected])[:, None]).train()
    me = stand_in(reward_trainer, model=model, args={"center_rewards_coefficient": centering})
    inputs = {"attention_mask": torch.ones(8, 3)}
    if margins is not None:
        inputs["margin"] = torch.tensor(margins, dtype=torch.float64)
    theirs = reward_trainer.compute_loss(me, model, inputs)
    losses, metrics = reward_loss(chosen, rejected, inputs.get("margin", 0.0), centering=centering or 0.0)
    check_close(losses.mean(), theirs, 1e-10)
    check_close(gradients(losses.mean(), scores)[0], gradients(theirs, scores)[0], 1e-10)
    expected = logged(me)
    check_close(metrics["margin"].mean(), expected["margin"])
    check_close(metrics["accuracy"].mean(), expected["accuracy"])
    check_close((metrics["chosen_reward"] + metrics["rejected_reward"]).mean() / 2, expected["mean_reward"])


def test_log1mexp_near_and_far() -> None:
    x = torch.tensor([-1e-15, -1e-9, -1e-4, -0.69, -0.7, -5.0, -800.0, -torch.inf], dtype=torch.float64)
    x = x.requires_grad_()
    values = log1mexp(x)
    expected = [-34.538776394910684, -20.723265837446294, -9.210390371559496]  # log(-x) + x/2 - ...
    check_close(values[:3], torch.tensor(expected, dtype=torch.float64), 1e-9)
    check_close(values[3:].exp(), 1 - x[3:].exp(), 1e-12)
    (grad,) = gradients(values.sum(), x)
    check_close(grad[:-1], -1 / torch.expm1(-x[:-1]), 1e-9)
    assert grad[-1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_answers_leave_orpo_finite(dtype: torch.dtype) -> None:
    """A mean log-probability that rounds to 0, on either side or both: TRL's gradient is no number there."""
    means = torch.tensor([0.0, -1e-8, -1e-3, 0.0, -0.5, 0.0, 1e-9, -30.0], dtype=dtype, requires_grad=True)
    losses, _ = orpo_loss(*chosen_and_rejected(means))
    (grad,) = gradients(losses.sum(), means)
    assert losses.isfinite().all()
    assert grad.isfinite().all()
    assert grad[3] > 0
    assert grad[5] > 0


def test_a_certain_rejected_answer_is_unlearned() -> None:
    """Its log-probability rounds to 0 in float32, and the other token's logit still rises at an ordinary rate."""
    logits = torch.tensor([[18.0, 0.0], [0.0, 0.0]], requires_grad=True)
    rejected, chosen = logits.log_softmax(-1)[:, 0]
    assert rejected > -(2.0**-23)
    losses, _ = orpo_loss(chosen[None], rejected[None])
    assert -1.0 < gradients(losses.sum(), logits)[0][0, 1] < -1e-3


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_extreme_ratios_leave_dpo_finite(kind: Any) -> None:
    chosen = torch.tensor([1e4, -1e4, 1e-30, 0.0], requires_grad=True)
    losses, _ = dpo_loss(chosen, -chosen, kind, lengths=(torch.full((4,), 9), torch.full((4,), 2)))
    assert losses.isfinite().all()
    assert gradients(losses.sum(), chosen)[0].isfinite().all()


def test_an_impossible_token_of_both_counts_for_neither() -> None:
    policy = torch.tensor([-1.0, -torch.inf, -2.0], requires_grad=True)
    reference = torch.tensor([-1.5, -torch.inf, -1.0])
    ratios = sequence_log_ratios(policy, reference, torch.tensor([0, 0, 1]), 2)
    assert ratios.tolist() == [0.5, -1.0]
    assert gradients(ratios.sum(), policy)[0].tolist() == [1.0, 0.0, 1.0]


def test_differences_are_taken_before_sums() -> None:
    """Half precision, and long answers whose policy is its reference: exactly 0, not the rounding of two sums."""
    policy = torch.linspace(-20, -0.1, 4097, dtype=torch.bfloat16)
    owners = torch.zeros(4097, dtype=torch.int64)
    assert sequence_log_ratios(policy, policy, owners, 1).tolist() == [0.0]
    moved = policy.float() + 1e-3
    check_close(sequence_log_ratios(moved, policy, owners, 1), [4.097], 1e-3)
    assert sequence_log_ratios(policy, policy, owners, 1).dtype == torch.float32


def test_a_policy_equal_to_its_reference() -> None:
    policy = log_probs(0)
    ratios = sequence_log_ratios(policy, policy.detach(), OWNERS, ROWS)
    losses, metrics = dpo_loss(*chosen_and_rejected(ratios))
    check_close(losses, [0.6931471805599453] * (ROWS // 2), 1e-12)
    assert metrics["margin"].abs().max() == 0
    assert metrics["accuracy"].max() == 0
    assert gradients(losses.sum(), policy)[0].abs().min() > 0
    assert kto_reference_point(ratios) == 0
    assert kto_reference_point(ratios[:0]) == 0


def test_micro_batches_of_any_size_and_order_give_the_same() -> None:
    policy, reference = log_probs(0), log_probs(1).detach()
    chosen, rejected = chosen_and_rejected(sequence_log_ratios(policy, reference, OWNERS, ROWS))
    whole, _ = dpo_loss(chosen, rejected)
    parts = [dpo_loss(chosen[i], rejected[i])[0] for i in (torch.tensor([3]), torch.tensor([2, 0]), torch.tensor([1]))]
    assert torch.equal(torch.cat(parts), whole[torch.tensor([3, 2, 0, 1])])


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda x: dpo_loss(x, x, "ipo"), "give lengths="),
        (lambda x: dpo_loss(x, x, "hinge", label_smoothing=0.1), "write 0"),
        (lambda x: dpo_loss(x, x, label_smoothing=0.5), "below 0.5"),
        (lambda x: dpo_loss(x, x, "robust"), "write sigmoid, ipo or hinge"),
        (lambda x: dpo_loss(x, x, beta=0.0), "beta is 0.0"),
        (lambda x: simpo_loss(x, x, beta=-1.0), "above 0"),
        (lambda x: orpo_loss(x, x, beta=float("nan")), "above 0"),
        (lambda x: kto_loss(x, x > 0, 0.0, beta=0.0), "above 0"),
    ],
)
def test_settings_out_of_range_are_refused(call: Any, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        call(-torch.ones(2))
