"""PEFT's LoRA files with trained biases, both ways: bias="lora_only", bias="all", lora_bias=True."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import kitout
from kitout import LoRA
from kitout.errors import FileError
from laws.activate import fresh_kit
from zoo import EXTRA, ZOO, out

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")

SPECIES = ZOO | EXTRA


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 3) -> None:
    draw = torch.Generator().manual_seed(seed)
    for name, p in sorted(module.named_parameters()):
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=draw) * (0.02 if "magnitude" in name else 0.1))


def in_peft(species: str, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(SPECIES[species].build(), folder).eval()


def same(kit: kitout.Kit, model: Any, species: str) -> None:
    batch = SPECIES[species].batch(3, 1)
    with torch.no_grad():
        torch.testing.assert_close(out(kit(**batch)), out(model(**batch)), rtol=1e-5, atol=1e-5)


def targets(*names: str, **settings: Any) -> dict[str, Any]:
    return {"target_modules": list(names)} | settings


ALL, ONLY, OF_B = {"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True, "init_lora_weights": True}


@pytest.mark.parametrize(
    ("species", "settings"),
    [
        ("bert", targets("query", "dense", **ONLY)),
        ("bert", targets("query", **ALL)),
        ("bert", targets("query", **ALL, **OF_B)),
        ("bert", targets("query", "value", **ALL, task_type="SEQ_CLS")),
        ("bert", targets("query", **ALL, modules_to_save=["classifier"], layers_to_transform=[1])),
        ("bert", targets("query", "word_embeddings", **ONLY, use_rslora=True)),
        ("bert", targets("query", "dense", **ALL, use_dora=True)),
        ("gpt2", targets("c_attn", "c_fc", **ALL, fan_in_fan_out=True)),
        ("gpt2", targets("c_attn", **OF_B, fan_in_fan_out=True)),
        ("llama", targets("q_proj", "down_proj", **OF_B)),
        ("llama", targets("q_proj", "down_proj", **OF_B, rank_pattern={"down_proj": 2}, use_rslora=True)),
        ("llama", targets("q_proj", **ONLY)),
        ("t5", targets("q", "wo", **OF_B, **ALL)),
        ("bart", targets("q_proj", "fc1", **ALL, task_type="SEQ_2_SEQ_LM")),
        ("vit", targets("q_proj", "projection", **ALL)),
        ("vit", targets("q_proj", "projection", **OF_B)),
    ],
    ids=str,
)
def test_both_ways(species: str, settings: dict[str, Any], tmp_path: Path) -> None:
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 10, "init_lora_weights": False} | settings))
    model = peft.get_peft_model(SPECIES[species].build(), config).eval()
    randomize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "theirs")
    kit = fresh_kit(SPECIES[species])
    kitout.load_peft(kit, tmp_path / "theirs", "a")
    kit.use("a")
    same(kit, model, species)
    assert (kit["a"].method.bias, kit["a"].method.lora_bias) == (config.bias, config.lora_bias)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    both = config.lora_bias and config.bias != "none"  # two biases of one output, which are one here
    assert kit.num_parameters("a").trainable == trainable or kit["a"].heads or both
    randomize(kit["a"], seed=5)
    kit.strength("a", 1.0 if config.use_dora or kit["a"].heads else 0.5)  # PEFT has no other for these
    kitout.save_peft(kit, "a", tmp_path / "ours")
    same(kit, in_peft(species, tmp_path / "ours"), species)
    kit.save("a", tmp_path / "kept")
    back = fresh_kit(SPECIES[species])
    kitout.load_peft(back, tmp_path / "ours", "peft")
    back.load(tmp_path / "kept", name="kept")
    for name in ("peft", "kept"):
        back.use(name)
        same(back, kit, species)


def test_a_bias_that_nothing_here_can_hold(tmp_path: Path) -> None:
    model = peft.get_peft_model(ZOO["bert"].build(), peft.LoraConfig(target_modules=["query"], bias="all"))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    held = load_file(file)
    held["base_model.model.bert.embeddings.word_embeddings.bias"] = torch.ones(48)
    save_file(held, file)
    with pytest.raises(FileError, match=r"no bias 'bert\.embeddings\.word_embeddings\.bias'"):
        kitout.load_peft(kitout.attach(ZOO["bert"].build()), tmp_path, "a")


@torch.no_grad()
def test_biases_that_torch_attention_reads(tmp_path: Path) -> None:
    """PEFT trains them where they are, in_proj_bias too."""
    specimen = EXTRA["siglip"]
    batch = specimen.batch(2, 0)
    model = peft.get_peft_model(specimen.build(), peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all"))
    for p in (p for p in model.parameters() if p.requires_grad):
        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.2)
    expected = model(**batch).pooler_output
    model.save_pretrained(tmp_path / "a")
    kit = fresh_kit(specimen)
    kitout.load_peft(kit, tmp_path / "a", "a")
    kit.use("a")
    assert (kit(**batch).pooler_output - expected).abs().max() < 1e-5 * expected.abs().max()
    kitout.save_peft(kit, "a", tmp_path / "b")
    again = peft.PeftModel.from_pretrained(specimen.build(), tmp_path / "b")(**batch).pooler_output
    assert (again - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (LoRA(lora_bias=True, dora=True), "no lora_bias with DoRA"),
        (LoRA(lora_bias=True, targets="attn.q embed"), "no lora_bias over an embedding"),
    ],
)
def test_new_biases_that_peft_cannot_hold(method: LoRA, said: str, tmp_path: Path) -> None:
    kit = kitout.attach(ZOO["llama"].build())
    kit.add("a", method)
    with pytest.raises(FileError, match=said):
        kitout.save_peft(kit, "a", tmp_path / "out")


def test_they_are_not_for_vllm(tmp_path: Path) -> None:
    kit = kitout.attach(ZOO["bert"].build())
    kit.add("a", LoRA(bias="all"))
    with pytest.raises(FileError, match=r"no trained biases \(bias='all', lora_bias=False\)"):
        kitout.save_peft(kit, "a", tmp_path / "out", for_vllm=True)


def test_written_while_merged(tmp_path: Path) -> None:
    """The base's own biases are those before the merge."""
    kit = kitout.attach(ZOO["bert"].build())
    kit.add("a", LoRA(bias="all"))
    randomize(kit["a"])
    kitout.save_peft(kit, "a", tmp_path / "before")
    kit.merge("a")
    kitout.save_peft(kit, "a", tmp_path / "merged")
    one, other = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("before", "merged"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
