"""Folders for vLLM: every scale is right for a reader that knows PEFT's patterns and for one that does not.

After vllm/lora/peft_helper.py and lora_model.py. Older versions apply lora_alpha / r to every module; newer ones match
`rank_pattern` and `alpha_pattern` as PEFT does.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import kitout
from kitout import IA3, LoRA, PromptTuning
from kitout.errors import FileError
from kitout.files.peft.config import patterns_of
from zoo import EXTRA, ZOO

SPECIES = ZOO | EXTRA


def trained(species: str, method: kitout.Method, **how: Any) -> kitout.Kit:
    kit = kitout.attach(SPECIES[species].build())
    kit.add("a", method, **how)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in kit["a"].parameters():
            p.add_(torch.randn(p.shape, generator=draw) * 0.1)
    return kit


def read(folder: Path, knows_patterns: bool) -> dict[str, Tensor]:
    """By module path the change of its weight, as vLLM computes it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    changes = {}
    for key in tensors:
        if not key.endswith(".lora_A.weight"):
            continue
        path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank, alpha = config["r"], config["lora_alpha"]
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        assert a.shape[0] <= rank  # what it makes room for
        if knows_patterns:
            rank, alpha = (
                next((v for p, v in config[f"{name}_pattern"].items() if re.match(rf"(.*\.)?({p})$", path)), default)
                for name, default in (("rank", rank), ("alpha", alpha))
            )
            assert rank == a.shape[0]
        changes[path] = alpha / (math.sqrt(rank) if config["use_rslora"] else rank) * (b @ a)
    return changes


@pytest.mark.parametrize("knows_patterns", [True, False])
@pytest.mark.parametrize(
    ("species", "method", "strength"),
    [
        ("llama", LoRA(rank=4, alpha=6, targets="all-linear"), 1.0),
        ("llama", LoRA(rank={"attn.*": 4, "mlp.*": 2}, targets="all-linear"), 1.0),
        ("llama", LoRA(rank={"attn.*": 2, "mlp.*": 6}, alpha=6, targets="all-linear"), 0.5),
        ("llama", LoRA(rank={"*": 3, "attn.q": 7}, alpha={"*": 5, "mlp.*": 9}, targets="all-linear", rslora=True), 1.0),
        ("llama", LoRA(rank={"attn.q": 2, "attn.v": 5}, alpha=7, init="pissa"), -0.5),
        ("phi3", LoRA(rank={"attn.*": 2, "mlp.*": 4}, alpha=3, targets="attn.q attn.v mlp.up"), 1.0),
    ],
)
def test_every_scale_is_right(
    species: str, method: kitout.Method, strength: float, knows_patterns: bool, tmp_path: Path
) -> None:
    kit = trained(species, method)
    kit.strength("a", strength)
    kitout.save_peft(kit, "a", tmp_path, for_vllm=True)
    changes = read(tmp_path, knows_patterns)
    merged, base = kit.merged_copy("a"), SPECIES[species].build()
    assert set(changes) == {s.path for s in kit["a"].sites}
    for path, change in changes.items():
        there = merged.get_submodule(path).weight - base.get_submodule(path).weight
        assert there.abs().max() > 1e-3
        torch.testing.assert_close(change, there, rtol=1e-4, atol=1e-6)


def test_values_are_kept_where_one_scale_serves_all(tmp_path: Path) -> None:
    """B is what it was, bit for bit; ranks by role come back as they were."""
    kit = trained("llama", LoRA(rank={"attn.*": 4, "mlp.*": 2}, targets="attn.q mlp.up"))
    kitout.save_peft(kit, "a", tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for site in kit["a"].sites:
        assert torch.equal(stored[f"base_model.model.{site.path}.lora_B.weight"], kit["a"].delta(site).b)
    other = kitout.attach(ZOO["llama"].build())
    assert kitout.load_peft(other, tmp_path, "a").method.rank == {"attn.q": 4, "mlp.up": 2}


def test_a_pattern_for_a_path_that_ends_another_one() -> None:
    assert patterns_of({"up": 1, "a.up": 2, "b.x": 1}, 1) == {"a.up": 2}
    patterns = patterns_of({"up": 2, "a.up": 1, "b.x-y": 3}, 1)
    assert patterns == {"^up": 2, r"b\.x\-y": 3}
    assert [bool(re.match(r"(.*\.)?(^up)$", path)) for path in ("up", "a.up")] == [True, False]


@pytest.mark.parametrize(
    ("species", "method", "heads", "said"),
    [
        ("llama", LoRA(dora=True), {}, r"DoRA \(dora=True\)"),
        ("llama", IA3(), {}, r"LoRA only, and this is IA3: serve kit.merged_copy\('a'\)"),
        ("llama", PromptTuning(), {}, "LoRA only, and this is PromptTuning"),
        ("bert", LoRA(), {"classifier": nn.Linear(48, 5)}, r"no heads \(modules_to_save\): classifier"),
        ("vit", LoRA(targets="patch"), {}, "no LoRA over Conv2d"),
    ],
)
def test_what_it_does_not_read_is_refused(
    species: str, method: kitout.Method, heads: dict[str, nn.Module], said: str, tmp_path: Path
) -> None:
    kit = trained(species, method, heads=heads)
    with pytest.raises(FileError, match=f"'a' cannot be read by vLLM: it .*{said}"):
        kitout.save_peft(kit, "a", tmp_path / "a", for_vllm=True)
    assert not (tmp_path / "a").exists()
    kitout.save_peft(kit, "a", tmp_path / "a")
