"""A scalar head stands in the place of the output head, gives [B, T] with its gradient, and travels in a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

import kitout
from kitout import IA3, LoRA
from kitout.align.scalar_head import head_path, last_scalars, last_tokens, scalar_head, scalars
from kitout.data.padding import pad
from kitout.errors import ConfigError, RouteError
from train.fixtures import add, kit_of
from zoo import D

BERT = BertConfig(
    vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=2
)


@pytest.mark.parametrize("species", ["llama", "llama-tied", "gpt2", "falcon"])
def test_it_stands_in_the_place_of_the_output_head(species: str) -> None:
    kit = kit_of(species)
    assert kit.base.get_submodule(head_path(kit)) is kit.base.get_output_embeddings()


@pytest.mark.parametrize(
    ("model", "reason"),
    [(BertForMaskedLM, "is an encoder"), (BertForSequenceClassification, "names no linear output head")],
)
def test_an_encoder_has_no_place_for_it(model: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        head_path(kitout.attach(model(BERT)))


def test_an_encoder_decoder_has_no_place_for_it() -> None:
    kit = kit_of("t5")
    with pytest.raises(ConfigError, match="encoder-decoder"):
        scalar_head(kit, 0)


def test_initial_values() -> None:
    kit = kit_of("llama", dtype=torch.bfloat16)
    before = torch.get_rng_state()
    head = scalar_head(kit, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert (head.in_features, head.out_features, head.weight.dtype) == (D, 1, torch.float32)
    assert not head.bias.any()
    assert torch.equal(head.weight, scalar_head(kit, 3).weight)
    assert not torch.equal(head.weight, scalar_head(kit, 4).weight)
    weights = torch.cat([scalar_head(kit, seed).weight.flatten() for seed in range(40)])
    assert weights.std().item() == pytest.approx((D + 1) ** -0.5, rel=0.05)
    assert scalar_head(kit_of("llama", dtype=torch.float64), 0).weight.dtype == torch.float64


def reward_kit(species: str = "llama", dtype: torch.dtype = torch.float64) -> Any:
    kit = kit_of(species, dtype=dtype)
    add(kit, "taste", LoRA(rank=2, targets="all-linear"), {head_path(kit): scalar_head(kit, 1)})
    kit.use("taste")
    return kit


def test_scalars_and_their_gradient_are_those_of_the_models_output() -> None:
    kit = reward_kit()
    ids, mask = pad([(5, 6, 7, 8), (9, 10)], 0, "right", kit.device)
    weights = torch.randn(ids.shape, dtype=torch.float64)
    found = scalars(lambda: kit(input_ids=ids, attention_mask=mask), kit)
    expected = kit(input_ids=ids, attention_mask=mask).logits[..., 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    gradients = [torch.autograd.grad((v * weights).sum(), list(kit.parameters())) for v in (found, expected)]
    for ours, models in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, models, rtol=0, atol=0)


def test_no_logits_are_computed_and_no_soft_cap_reaches_the_scalar() -> None:
    kit = reward_kit("gemma2")
    kit["taste"].heads["lm_head"].module.weight.data.mul_(1e4)
    kit.base.lm_head.weight = nn.Parameter(torch.full_like(kit.base.lm_head.weight, float("nan")), requires_grad=False)
    ids = torch.tensor([[5, 6, 7]])
    found = scalars(lambda: kit(input_ids=ids), kit)
    assert found.isfinite().all()
    assert found.abs().max() > kit.config.final_logit_softcapping


def test_the_last_token_is_found_under_either_padding() -> None:
    kit = reward_kit()
    rows = [(5, 6, 7, 8), (9, 10), (11,)]
    found = []
    for side in ("left", "right"):
        ids, mask = pad(rows, 0, side, kit.device)  # type: ignore[arg-type]
        found.append(last_scalars(lambda: kit(input_ids=ids, attention_mask=mask), kit, mask))  # noqa: B023
    alone = torch.stack([scalars(lambda: kit(input_ids=torch.tensor([row])), kit)[0, -1] for row in rows])  # noqa: B023
    for values in found:
        torch.testing.assert_close(values, alone, rtol=0, atol=1e-6)  # rotary angles are float32
    assert last_tokens(torch.tensor([[0, 1, 1], [1, 1, 0], [1, 0, 0]])).tolist() == [2, 1, 0]


def test_without_a_scalar_head_is_refused_before_the_model_runs() -> None:
    kit = reward_kit()
    add(kit, "policy", LoRA(rank=2))
    for route in ("policy", None):
        kit.use(route)
        with pytest.raises(RouteError, match=r"has no scalar head at lm_head: kit\.add"):
            scalars(lambda: pytest.fail("the model ran"), kit)


# Run here and in another process, which imports little.
SCORES = """
import torch, kitout
from transformers import LlamaConfig, LlamaForCausalLM
from kitout.align.roles import roles
from kitout.align.scalar_head import head_path, scalar_head
from kitout.train.objectives.objective import Batch

def new_kit():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, eos_token_id=None, bos_token_id=None)
    return kitout.attach(LlamaForCausalLM(config))

def scores(kit):
    ids, mask = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    targets = {"positions": torch.tensor([1, 2, 6]), "labels": torch.tensor([7, 8, 10])}
    batch = Batch({"input_ids": ids, "attention_mask": mask}, targets, 2, 6)
    return roles(kit, batch, {"taste": "last", "value": "all", None: "tokens"})
"""
LOAD = """
import sys
kit = new_kit()
for name in ("taste", "value"):
    kit.load(f"{sys.argv[1]}/{name}")
torch.set_num_threads(1)
torch.save(scores(kit), f"{sys.argv[1]}/scores.pt")
"""


@pytest.mark.slow
def test_reward_and_value_heads_travel_to_another_process(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(SCORES, names)
    kit = names["new_kit"]()
    add(kit, "taste", LoRA(rank=2, targets="all-linear"), {head_path(kit): scalar_head(kit, 1)})
    add(kit, "value", IA3(), {head_path(kit): scalar_head(kit, 2)})
    expected = names["scores"](kit)
    for name in ("taste", "value"):
        kit.save(name, tmp_path / name)
    path = os.pathsep.join([str(Path(kitout.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", SCORES + LOAD, str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, timeout=300)
    found = torch.load(tmp_path / "scores.pt")
    assert {role: len(values) for role, values in found.items()} == {"taste": 2, "value": 3, None: 3}
    for role, values in expected.items():
        assert torch.equal(found[role], values)
