"""What docs/align.md says in figures and names: the weights that ppo holds, and what TRL's settings are called here."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kitout
from kitout import LoRA
from kitout.align.config.foreign_keys import ADVICE
from kitout.align.scalar_head import head_path, scalar_head
from kitout.train.config.foreign_keys import key_hint

PAGE = (Path(__file__).parents[2] / "docs" / "align.md").read_text(encoding="utf-8")
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip


def test_the_weights_of_ppo_are_a_base_and_four_adapters() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SMOLLM2))
    kit = kitout.attach(model)
    base = sum(value.numel() for value in kit.base.parameters())
    numbers = {"base": base}
    for role in ("policy", "reference", "reward", "value"):
        heads = {head_path(kit): scalar_head(kit, 0)} if role in ("reward", "value") else None
        kit.add(role, LoRA(), seed=0, heads=heads)
        numbers[role] = sum(value.numel() for value in kit[role].parameters())
    numbers["all"] = sum(numbers.values())
    rows = re.findall(r"^\| (\w+)[^|]*\| ([\d,]+) \| ([\d.]+) % \|$", PAGE, flags=re.MULTILINE)
    assert {role: int(number.replace(",", "")) for role, number, _ in rows} == numbers
    for role, _, share in rows:
        digits = 1 if role in ("base", "all") else 2
        assert float(share) == round(100 * numbers[role] / base, digits), role


def test_settings_of_trl_lead_to_those_of_the_page() -> None:
    table = PAGE.split("| setting of TRL | here |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (`.*) \| (.*) \|$", table, flags=re.MULTILINE)
    assert len(rows) > 25
    for names, here in rows:
        for name in re.findall(r"`(\w+)`", names):
            hint = key_hint(name, ADVICE)
            assert hint is not None, name
            setting = re.match(r"`([^`]+)`", here)
            assert hint == f"write {setting[1]}" if setting else hint.startswith("leave it out"), (name, hint)


def test_losses_start_where_the_page_says() -> None:
    from kitout.align.losses.preference import dpo_loss, kto_loss

    zero = torch.zeros(1)
    ones = torch.ones(1)
    found = {kind: dpo_loss(zero, zero, kind, lengths=(ones, ones))[0].item() for kind in ("sigmoid", "hinge", "ipo")}
    assert f"log 2 = {found['sigmoid']:.3f} (hinge {found['hinge']:g}, ipo 1 / (4 beta^2) = {found['ipo']:g} at" in PAGE
    assert f"starts at {kto_loss(zero, torch.tensor([True]), 0.0)[0].item():g}" in PAGE
