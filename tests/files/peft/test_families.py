"""What PEFT itself writes for other families: all-linear, lists, patterns, exclusions, ranks above the width.

Modules end a sublayer whose site has the same path, names repeat at different depths, or one linear is narrow.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import kitout
import zoo
from files.peft.test_folder import loaded_by_peft, randomize
from kitout import LoRA
from zoo import EXTRA, ZOO, out

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning"
)  # peft's own

SIZES = {"vocab_size": 99, "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 80}
DECODER = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}


def clip() -> nn.Module:
    parts = {"text_config": {**SIZES, "max_position_embeddings": 64}, "vision_config": VISION}
    return hf.CLIPModel(hf.CLIPConfig(**parts, projection_dim=48))


def lfm2() -> nn.Module:
    kinds = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False}
    return hf.Lfm2ForCausalLM(hf.Lfm2Config(**DECODER, **kinds))


def bamba() -> nn.Module:
    return hf.BambaForCausalLM(hf.BambaConfig(**DECODER, **MAMBA, attn_layer_indices=[1]))


def qwen2() -> nn.Module:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER))


def qwen2_moe() -> nn.Module:
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**DECODER, **EXPERTS))


def mbart() -> nn.Module:
    stacks = {
        f"{s}_{k}": n
        for s in ("encoder", "decoder")
        for k, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 80))
    }
    return hf.MBartForConditionalGeneration(
        hf.MBartConfig(vocab_size=99, d_model=48, max_position_embeddings=64, **stacks)
    )


def nested() -> nn.Module:
    """The path of one stack is the end of another's."""

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = hf.ViTConfig(**VISION)
            self.layers = hf.ViTModel(config).layers
            self.teacher = nn.Module()
            self.teacher.layers = hf.ViTModel(config).layers

        def forward(self, x: Tensor) -> Tensor:
            for layer in (*self.teacher.layers, *self.layers):
                x = layer(x)
            return x

    return Twins()


def image_and_text(rows: int, seed: int) -> dict[str, Tensor]:
    return zoo.text_batch(rows, seed) | zoo.image_batch(rows, seed)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[..., dict[str, Tensor]]]] = {
    "albert": (EXTRA["albert"].build, EXTRA["albert"].batch),
    "modernbert": (EXTRA["modernbert"].build, EXTRA["modernbert"].batch),
    "clip": (clip, image_and_text),
    "lfm2": (lfm2, zoo.text_batch),
    "bamba": (bamba, zoo.text_batch),
    "qwen2": (qwen2, zoo.text_batch),
    "qwen2-moe": (qwen2_moe, zoo.text_batch),
    "mbart": (mbart, zoo.seq2seq_batch),
    "nested": (nested, lambda rows, _: {"x": torch.randn(rows, 3, 48, generator=torch.Generator().manual_seed(1))}),
}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("albert", {"target_modules": "all-linear"}),
    ("modernbert", {"target_modules": "all-linear"}),
    ("clip", {"target_modules": "all-linear"}),
    ("clip", {"target_modules": r".*vision_model.*\.(out_proj|fc2)"}),
    ("lfm2", {"target_modules": "all-linear"}),
    ("lfm2", {"target_modules": ["out_proj", "w2"], "exclude_modules": r".*\.conv\..*"}),
    ("bamba", {"target_modules": "all-linear"}),
    ("qwen2", {"target_modules": r".*\.1\..*(o_proj|down_proj)"}),
    ("qwen2", {"target_modules": r"^(?!.*\.0\.).*(q_proj|o_proj)$"}),
    ("qwen2", {"target_modules": ["o_proj", "q_proj"], "exclude_modules": r".*\.0\..*"}),
    ("qwen2", {"target_modules": "all-linear", "exclude_modules": ["down_proj", "layers.1.self_attn.o_proj"]}),
    ("qwen2", {"target_modules": ["o_proj", "k_proj"], "r": 60, "use_rslora": True}),
    ("qwen2", {"target_modules": ["o_proj", "k_proj"], "r": 60, "use_dora": True}),
    ("qwen2", {"target_modules": ["o_proj", "k_proj"], "rank_pattern": {r"(\w+\.)*1\.(\w+\.)+k_proj": 3}}),
    ("qwen2-moe", {"target_modules": ["q_proj", "shared_expert_gate"], "r": 5}),
    ("mbart", {"target_modules": r".*decoder.*\.(out_proj|fc2)"}),
    ("mbart", {"target_modules": ["out_proj", "fc2"], "exclude_modules": r".*(encoder_attn|encoder\.layers\.1).*"}),
    ("nested", {"target_modules": r"layers\.0\.(attention\.\w+|mlp\.fc\d)|teacher\.layers\.1\..*fc1"}),
    ("nested", {"target_modules": ["q_proj"], "rank_pattern": {r"^layers.0.*": 3, r"layers.0.*": 5}}),
]  # fmt: skip


def built(family: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return zoo.randomize_model(FAMILIES[family][0](), seed=0)


def compared(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model(**batch)
    return output["logits_per_text"] if "logits_per_text" in getattr(output, "keys", list)() else out(output)


@pytest.mark.parametrize(("family", "settings"), CASES, ids=[f"{i}-{family}" for i, (family, _) in enumerate(CASES)])
def test_a_file_of_peft_computes_the_same_here_and_back(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    batch = FAMILIES[family][1](2, 1)
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 10, "init_lora_weights": False} | settings))
    theirs = peft.get_peft_model(built(family), config).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = compared(theirs, batch)
    assert (expected - compared(built(family), batch)).abs().max() > 1e-3
    kit = kitout.attach(built(family))
    adapter = kitout.load_peft(kit, tmp_path / "theirs", "a")
    assert sum(p.numel() for p in adapter.parameters()) == sum(
        p.numel() for p in theirs.parameters() if p.requires_grad
    )  # every rank is the file's own
    kit.use("a")
    torch.testing.assert_close(compared(kit, batch), expected, rtol=1e-5, atol=1e-5)
    kit.save("a", tmp_path / "own")
    kit.load(tmp_path / "own", name="b")
    with kit.use("b"):
        assert torch.equal(compared(kit, batch), compared(kit, batch))
        torch.testing.assert_close(compared(kit, batch), expected, rtol=1e-5, atol=1e-5)
    kitout.save_peft(kit, "a", tmp_path / "back")
    model, report = loaded_by_peft(built(family), tmp_path / "back")
    assert not report.unexpected_keys
    torch.testing.assert_close(compared(model, batch), expected, rtol=1e-5, atol=1e-5)


def test_a_list_that_people_copy_is_the_one_of_peft(tmp_path: Path) -> None:
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft.get_peft_model(ZOO["llama"].build(), peft.LoraConfig(target_modules=names)).save_pretrained(tmp_path / "peft")
    kit = kitout.attach(ZOO["llama"].build())
    kitout.load_peft(kit, tmp_path / "peft", "a")
    kit.add("b", LoRA(targets=" ".join(names)))
    assert kit["a"].sites == kit["b"].sites
