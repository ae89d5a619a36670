"""What the laws are tested on: at least one case per registered method, and every setting of it once off its default.

A new method adds its lines here and is tested by all the laws; `test_00_everyone.py` fails until it has. A case may be
impossible on some species (no embedding in a vision model): `refused` says where, and the laws test that adding it
there raises instead. KITOUT_LAWS=all tests the rarer models of the zoo as well. This module knows the methods' names
and settings, nothing of how they work.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from kitout import (
    IA3,
    SSF,
    AdaptFormer,
    BitFit,
    FullFineTuning,
    Houlsby,
    LoRA,
    Method,
    ParallelAdapter,
    PartialFineTuning,
    Pfeiffer,
)
from zoo import EXTRA, ZOO, Specimen


@dataclass(frozen=True)
class Case:
    """One method with one choice of settings.

    refused: species where it has no place. rounds: its identity holds up to rounding (it renormalises, or takes off
    again what it added) and not bit for bit. by_row: species where rows of one batch may wear it. mixes: it may be a
    part of a Mix.
    """

    name: str
    method: Method
    refused: Callable[[Specimen], bool] = lambda specimen: False
    rounds: bool = False
    by_row: Callable[[Specimen], bool] = lambda specimen: True
    mixes: bool = True


SPECIES = {**ZOO, **(EXTRA if os.environ.get("KITOUT_LAWS") == "all" else {})}


def experts(specimen: Specimen) -> bool:
    """The feed-forward is stacked in 3-D parameters: no linear to act on."""
    return specimen.name == "mixtral"


def one_block(specimen: Specimen) -> bool:
    return specimen.layers == 1


def no_text(specimen: Specimen) -> bool:
    return not specimen.is_text


def no_table(specimen: Specimen) -> bool:
    return no_text(specimen) or experts(specimen)


def not_relative(specimen: Specimen) -> bool:
    """No table of relative positions and no router of experts in a block: those see no rows."""
    return specimen.positions != "relative" and not experts(specimen)


def plain_blocks(specimen: Specimen) -> bool:
    return specimen.is_text and not experts(specimen)


def own_tables(specimen: Specimen) -> bool:
    """Every parameter belongs to something that sees the batch: no class tokens, no tables of relative positions."""
    return specimen.is_text and not_relative(specimen)


def text(specimen: Specimen) -> bool:
    return specimen.is_text


CASES: tuple[Case, ...] = (
    Case("lora", LoRA(rank=3, alpha=5)),
    Case("lora-all", LoRA(rank=3, alpha=5, targets="all-linear")),
    Case("lora-input", LoRA(rank=2, alpha=3, targets="in:mlp.down in:attn.o"), refused=experts),
    Case("lora-head", LoRA(rank=2, alpha=3, targets="head attn.k")),
    Case("lora-embed", LoRA(rank=2, alpha=3, targets="embed mlp.up"), refused=no_table),
    Case("lora-patch", LoRA(rank=2, alpha=3, targets="patch mlp.up"), refused=text),
    Case("lora-last", LoRA(rank=2, targets="attn.* mlp.*", layers="last:1"), refused=experts),
    Case(
        "lora-roles",
        LoRA(rank={"attn.*": 2, "mlp.*": 4}, alpha={"*.*": 3, "mlp.*": 7}, targets="attn.* mlp.*"),
        refused=experts,
    ),
    Case("lora-dropout", LoRA(rank=2, dropout=0.3)),
    Case("rslora", LoRA(rank=4, alpha=3, rslora=True)),
    Case("dora", LoRA(rank=2, alpha=3, dora=True, targets="all-linear"), rounds=True),
    Case("dora-qv", LoRA(rank=2, alpha=3, dora=True), rounds=True),
    Case("pissa", LoRA(rank=3, alpha=5, init="pissa", targets="attn.q mlp.*"), rounds=True, refused=experts),
    Case("ia3", IA3(), refused=experts),
    Case("ia3-qkv", IA3(preset="qkv")),
    Case("ia3-norm", IA3(targets="norm in:attn.o", layers="0-1"), refused=one_block),
    Case("bitfit", BitFit()),
    Case("bitfit-everywhere", BitFit(everywhere=True)),
    Case("bitfit-v", BitFit(targets="attn.v mlp.down", layers="last:1"), refused=experts),
    Case("ssf", SSF()),
    Case("ssf-v", SSF(std=0.1, targets="attn.v mlp.*"), refused=experts),
    Case("houlsby", Houlsby(width=6)),
    Case("houlsby-bare", Houlsby(width=5, norms=False, activation="relu", std=0.05)),
    Case("pfeiffer", Pfeiffer(width=6)),
    Case("pfeiffer-silu", Pfeiffer(width=5, activation="silu", std=0.1, layers="last:1")),
    Case("parallel", ParallelAdapter(width=6)),
    Case(
        "parallel-learned", ParallelAdapter(width=5, scale="learned", dropout=0.2, activation="gelu", targets="sub.*")
    ),
    Case("adaptformer", AdaptFormer(width=6)),
    Case("adaptformer-learned", AdaptFormer(width=5, scale="learned", dropout=0.0)),
    Case("full", FullFineTuning(), by_row=own_tables),
    Case("full-blocks", FullFineTuning(targets="attn.* mlp.* norm", layers="last:1"), refused=experts),
    Case("partial-last", PartialFineTuning(last=1), by_row=plain_blocks),
    Case("partial-head", PartialFineTuning(part="head")),
    Case("partial-norms", PartialFineTuning(part="norms")),
    Case("partial-names", PartialFineTuning(names="*.1.*"), by_row=not_relative, refused=one_block),
)

CELLS = [(s, c) for s in SPECIES.values() for c in CASES if not c.refused(s)]
REFUSED = [(s, c) for s in SPECIES.values() for c in CASES if c.refused(s)]


def name_of(value: object) -> str | None:
    """pytest's id for a specimen or a case."""
    return getattr(value, "name", None)
