"""Copies of a base that keeps tensors of its last forward: with a graph in an attribute, a list, a buffer, a cache."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import utils
from transformers import AutoModelForCausalLM, DynamicCache, RecurrentGemmaConfig

import kitout
from kitout import LoRA
from kitout.errors import NotMergeable
from runtime.merge.hosts import assert_same, kit_over, untrivial


class Remembering(nn.Linear):
    """It keeps what it computed, in every way a module can."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.register_buffer("last", None, persistent=False)
        self.handle = self.register_forward_hook(Remembering.remember)

    def remember(self, _args: Any, y: Tensor) -> None:
        self.state, self.last = y, 2 * y
        self.history = [{"twice": (y, y + 1)}]
        self.cache = DynamicCache()
        self.cache.update(y[:, None], y[:, None], 0)


def test_a_copy_after_a_training_step() -> None:
    kit, x = kit_over(Remembering(), (2, 5, 8))
    untrivial(kit, "a", LoRA(rank=2, alpha=5, targets="*patch"))
    with kit.use("a"):
        kit(x).square().mean().backward()
        assert kit.base.patch.state.grad_fn is not None
        plain = kit.merged_copy("a")
        assert plain.patch.state is plain.patch.history[0]["twice"][0]
        for value in (plain.patch.state, plain.patch.last, plain.patch.cache.layers[0].keys):
            assert value.grad_fn is None
        assert torch.equal(plain.patch.state, kit.base.patch.state)
        assert_same(plain(x), kit(x))
        kit.merge("a")


def test_a_head_with_such_a_state() -> None:
    kit, x = kit_over(nn.Linear(8, 8), (2, 5, 8))
    kit.add("h", LoRA(rank=2, targets="*.q"), heads={"patch": Remembering()})
    with kit.use("h"):
        attached = kit(x)
        attached.square().mean().backward()
        assert_same(kit.merged_copy("h")(x), attached)
    kit.merge("h")
    assert_same(kit(x), attached)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_a_weight_that_was_computed_with_a_graph() -> None:
    kit, x = kit_over(utils.weight_norm(nn.Linear(8, 8)), (2, 5, 8))
    untrivial(kit, "a", LoRA(rank=2, targets="*.q"))
    kit.base.patch.weight = kit.base.patch.weight.detach().requires_grad_() * 1
    with torch.no_grad(), kit.use("a"):
        assert_same(kit.merged_copy("a")(x), kit(x))


def test_what_cannot_be_copied_at_all() -> None:
    kit, _ = kit_over(Remembering(), (2, 5, 8))
    untrivial(kit, "a", LoRA(rank=2, targets="*patch"))
    kit.base.patch.lock = threading.Lock()
    with pytest.raises(NotMergeable, match=r"(?s)cannot be copied \(TypeError.*kit.merge\(\.\.\.\) works in place"):
        kit.merged_copy("a")
    kit.merge("a")


def test_others_copy_as_before() -> None:
    """Nothing is left behind that changes how torch copies."""
    kit, x = kit_over(Remembering(), (2, 5, 8))
    untrivial(kit, "a", LoRA(rank=2, targets="*patch"))
    kit.merged_copy("a")
    y = x.requires_grad_() * 2
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(y)


def test_a_recurrent_model_after_a_training_step() -> None:
    torch.manual_seed(0)
    config = RecurrentGemmaConfig(
        num_hidden_layers=3,
        vocab_size=50,
        hidden_size=16,
        intermediate_size=48,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        lru_width=16,
        attention_window_size=16,
    )
    kit = kitout.attach(AutoModelForCausalLM.from_config(config).eval())
    untrivial(kit, "a", LoRA(rank=2, alpha=5, targets="all-linear *.conv_1d"))
    ids = torch.randint(3, 40, (2, 6))
    kit.train()
    with kit.use("a"):
        kit(input_ids=ids).logits.square().mean().backward()
        plain = kit.merged_copy("a").eval()
        kit.eval()
        with torch.no_grad():
            assert_same(plain(input_ids=ids).logits, kit(input_ids=ids).logits)
