"""Weights that are computed of other parameters: adapted, merged into those parameters, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import AutoModel, Wav2Vec2Config

import kitout
from kitout import IA3, SSF, BitFit, FullFineTuning, LoRA, Method, PartialFineTuning, Stack
from kitout.errors import NotMergeable
from runtime.merge.hosts import assert_merges, assert_same, kit_over, untrivial

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")


class Doubled(nn.Module):
    """A parametrization with an inverse."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


class Bent(nn.Module):
    """One without."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


def parametrized(module: nn.Module, *parts: nn.Module) -> nn.Module:
    for part in parts:
        parametrize.register_parametrization(module, "weight", part)
    return module


INVERTIBLE: dict[str, Callable[[], nn.Module]] = {
    "weight-norm": lambda: parametrizations.weight_norm(nn.Conv1d(8, 8, 4, groups=2, padding=2), dim=2),
    "older-weight-norm": lambda: utils.weight_norm(nn.Conv1d(8, 8, 3)),
    "weight-norm-linear": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    "two": lambda: parametrized(nn.Linear(8, 8), Doubled(), Doubled()),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "spectral-norm": lambda: parametrizations.spectral_norm(nn.Conv1d(8, 8, 3)),
    "older-spectral-norm": lambda: utils.spectral_norm(nn.Linear(8, 8)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(8, 8)),
    "own": lambda: parametrized(nn.Linear(8, 8), Bent()),
    "pruned": lambda: prune.random_unstructured(nn.Conv1d(8, 8, 3), "weight", 0.3),
}
ON_WEIGHT: dict[str, Method] = {
    "lora": LoRA(rank=3, alpha=5, targets="*patch"),
    "dora": LoRA(rank=3, alpha=5, dora=True, targets="*patch"),
    "ia3": IA3(targets="*patch"),
    "ia3-in": IA3(targets="in:*patch"),
    "ssf": SSF(targets="*patch"),
}
ELSEWHERE: dict[str, Method] = {
    "bitfit": BitFit(targets="*patch"),
    "full": FullFineTuning(),
    "partial": PartialFineTuning(names="patch*"),
}


def shape_for(patch: nn.Module) -> tuple[int, ...]:
    return (2, 5, 8) if isinstance(patch, nn.Linear) else (2, 8, 9)


@pytest.mark.parametrize("form", [*INVERTIBLE, *OTHERS])
def test_merged_equals_attached_or_is_refused(form: str) -> None:
    patch = {**INVERTIBLE, **OTHERS}[form]()
    kit, x = kit_over(patch, shape_for(patch))
    for name, method in {**ON_WEIGHT, **ELSEWHERE}.items():
        adapter = untrivial(kit, name, method)
        with kit.use(name):
            kit(x).square().mean().backward()
        assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
        scales_only = name in ("ia3", "ia3-in", "ssf")  # which a mask lets through
        if form in INVERTIBLE or name in ELSEWHERE or (form == "pruned" and scales_only):
            assert_merges(kit, x, name)
        else:
            for merge in (kit.merge, kit.merged_copy):
                with pytest.raises(NotMergeable, match=r"patch .*computes its weight by"):
                    merge(name)
            assert not kit.merged
        kit.remove(name)


@pytest.mark.parametrize("form", INVERTIBLE)
def test_its_trained_parameters_under_another_adapter(form: str) -> None:
    patch = INVERTIBLE[form]()
    kit, x = kit_over(patch, shape_for(patch))
    untrivial(kit, "full", FullFineTuning())
    untrivial(kit, "lora", ON_WEIGHT["lora"])
    untrivial(kit, "ssf", ON_WEIGHT["ssf"])
    for order in (("full", "lora", "ssf"), ("ssf", "full", "lora")):
        with torch.no_grad(), kit.use(Stack(*order)):
            attached = kit(x)
        bits = {key: value.clone() for key, value in kit.base.state_dict().items()}
        kit.merge(*order)
        assert_same(kit(x), attached)
        kit.unmerge()
        assert all(torch.equal(value, bits[key]) for key, value in kit.base.state_dict().items())


@pytest.mark.parametrize("form", [*INVERTIBLE, *OTHERS])
def test_files(form: str, tmp_path: Path) -> None:
    patch = {**INVERTIBLE, **OTHERS}[form]()
    kit, x = kit_over(patch, shape_for(patch))
    for name, method in {"lora": ON_WEIGHT["lora"], "full": ELSEWHERE["full"]}.items():
        untrivial(kit, name, method)
        with torch.no_grad(), kit.use(name):
            attached = kit(x)
        kit.save(name, tmp_path / name)
        kit.remove(name)
        kit.load(tmp_path / name)
        with torch.no_grad(), kit.use(name):
            assert torch.equal(kit(x), attached)


def test_a_speech_encoder_with_a_weight_normed_position_convolution(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_stride=(4, 4),
        conv_kernel=(8, 8),
        conv_bias=True,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    kit = kitout.attach(AutoModel.from_config(config).eval())
    batch = {"input_values": torch.randn(2, 400)}
    for name, method in {
        "lora": LoRA(rank=3, alpha=5, targets="*.conv attn.q"),
        "bitfit": BitFit(),
        "full": FullFineTuning(),
    }.items():
        untrivial(kit, name, method)
        with torch.no_grad(), kit.use(name):
            attached = kit(**batch).last_hidden_state
        plain = kit.merged_copy(name)
        plain.save_pretrained(tmp_path / name)
        again = AutoModel.from_pretrained(tmp_path / name).eval()
        kit.merge(name)
        kit.save(name, tmp_path / f"{name}-adapter")
        with torch.no_grad():
            for merged in (plain, again, kit):
                assert_same(merged(**batch).last_hidden_state, attached)
        kit.unmerge()
        kit.remove(name)
        kit.load(tmp_path / f"{name}-adapter")
        with torch.no_grad(), kit.use(name):
            assert_same(kit(**batch).last_hidden_state, attached)
