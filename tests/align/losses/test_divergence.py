"""Estimates of the KL divergence against the divergence itself, their digits, and the controller of its coefficient."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from align.losses.trl_stand_in import check_close, gradients
from kitout.align.losses.divergence import AdaptiveKL, k1, k3, log_ratio, ratio
from kitout.errors import ConfigError, TrainingDiverged


def test_expectations_are_the_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 20, generator=generator, dtype=torch.float64).log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum()
    check_close((p.exp() * k1(p, q)).sum(), divergence, 1e-12)
    check_close((p.exp() * k3(p, q)).sum(), divergence, 1e-12)
    assert (k3(p, q) >= 0).all()
    assert (k1(p, q) < 0).any()


def test_small_differences_keep_their_digits() -> None:
    """exp(d) - d - 1 in float32 has none left at 1e-4: d^2 / 2 is 5e-9."""
    p = torch.tensor([-2.0], requires_grad=True)
    q = p.detach() + 2.0**-13
    torch.testing.assert_close(k3(p, q), torch.tensor([2.0**-27]), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(gradients(k3(p, q).sum(), p)[0], torch.tensor([-(2.0**-13)]), rtol=1e-3, atol=0.0)


def test_impossible_tokens() -> None:
    p = torch.tensor([-torch.inf, -torch.inf, -1.0], requires_grad=True)
    q = torch.tensor([-torch.inf, -1.0, -torch.inf])
    assert log_ratio(p, q).tolist() == [0.0, -math.inf, math.inf]
    assert k3(p, q)[0] == 0
    assert k3(p, q)[1].isfinite()
    assert k3(p, q)[2] == math.inf
    assert gradients(k3(p, q)[:2].sum(), p)[0].tolist() == [0.0, 0.0, 0.0]
    assert ratio(log_ratio(p, q)).isfinite().all()
    assert ratio(log_ratio(p, q)).tolist()[:2] == [1.0, 0.0]


def test_half_precision_is_raised_first() -> None:
    p = torch.tensor([-1.0, -2.0], dtype=torch.float16)
    assert log_ratio(p, p.float() + 1e-4).dtype == torch.float32
    check_close(k1(p, p.float() + 1e-4), [-1e-4, -1e-4], 1e-7)


def test_the_coefficient_moves_the_divergence_to_its_target() -> None:
    start = AdaptiveKL(beta=0.2, target=6.0, horizon=100.0)
    assert start.update(6.0, 50) == start
    check_close(start.update(6.6, 50).beta, 0.2 * (1 + 0.1 * 0.5))
    check_close(start.update(60.0, 50).beta, 0.2 * (1 + 0.2 * 0.5))  # never faster
    check_close(start.update(-5.0, 50).beta, 0.2 * (1 - 0.2 * 0.5))
    check_close(start.update(math.inf, 1000).beta, 0.2 * 1.2)  # more answers than the horizon
    assert AdaptiveKL(**dataclasses.asdict(start.update(9.0, 8))) == start.update(9.0, 8)
    state = start
    for _ in range(200):
        state = state.update(0.0, 100)
    assert 0 < state.beta < 1e-15
    with pytest.raises(TrainingDiverged, match="not a number"):
        start.update(math.nan, 1)
    for name in ("beta", "target", "horizon"):
        with pytest.raises(ConfigError, match=f"{name} of the KL controller"):
            AdaptiveKL(**{name: 0.0})
