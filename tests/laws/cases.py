"""What the laws are tested on: at least one case per registered method, and every setting of it once off its default.

A new method adds its lines here and is tested by all the laws; `test_00_coverage.py` fails until it has. A case may be
impossible on some species (no embedding in a vision model): `refused` says where, and the laws test that adding it
there raises instead. What composes others is the same machinery everywhere, so the laws that cost most try each
composition on some species and on each species some (`COSTLY`). KITOUT_LAWS=all tests the rarer models of the zoo as
well. This module knows the methods' names and settings, nothing of how they work.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from kitout import (
    IA3,
    MAM,
    SSF,
    VPT,
    AdaptFormer,
    Average,
    BitFit,
    Composition,
    FullFineTuning,
    Fusion,
    Gated,
    Houlsby,
    LoRA,
    Method,
    Mix,
    Mixture,
    Only,
    ParallelAdapter,
    PartialFineTuning,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
    Stack,
)
from zoo import EXTRA, ZOO, Specimen


@dataclass(frozen=True)
class Case:
    """One method with one choice of settings."""

    name: str
    """Its name among the cases."""
    method: Method
    """The method with its settings."""
    refused: Callable[[Specimen], bool] = lambda specimen: False
    """Species where it has no site."""
    rounds: bool = False
    """Its identity holds up to rounding and not bit for bit: it normalizes, or subtracts again what it added."""
    by_row: Callable[[Specimen], bool] = lambda specimen: True
    """Species where rows of one batch may have it."""
    mixes: bool = True
    """It may be in a Mix, with any weight."""
    strengths: bool = True
    """It may be active at other strengths than 1."""
    eager: Callable[[Specimen], bool] = lambda specimen: True
    """Species where it may be active when they write their attention out."""
    counts: Callable[[Specimen], bool] = lambda specimen: False
    """Species whose positions it takes from the mask."""
    parts: tuple[tuple[str, Method], ...] = ()
    """The adapters that it composes, by name."""
    trains: bool = True
    """It has values of its own."""
    composes: bool = False
    """It is a composition of other methods."""
    only_on: tuple[str, ...] = ()
    """The species that it is tried on; all where empty."""

    def is_tried_on(self, specimen: Specimen) -> bool:
        return not self.only_on or specimen.name in self.only_on


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


def inline(specimen: Specimen) -> bool:
    """It writes its attention out: no call to add keys to."""
    return specimen.name in ("mpt", "gptj")


def closed(specimen: Specimen) -> bool:
    """No attention over the whole sequence: windows, or none that takes keys."""
    return inline(specimen) or specimen.name in ("swin", "modernbert")


def uncrossed(specimen: Specimen) -> bool:
    return specimen.kind != "encoder-decoder"


def in_interface(specimen: Specimen) -> bool:
    """Not timm's attention, which has no call to add keys to when it is not fused."""
    return specimen.name != "timm-vit"


def decoder(specimen: Specimen) -> bool:
    return specimen.kind == "decoder"


def talks(specimen: Specimen) -> bool:
    return specimen.kind in ("decoder", "encoder-decoder")


def no_front(specimen: Specimen) -> bool:
    return no_text(specimen) or inline(specimen)


def no_tokens_or_closed(specimen: Specimen) -> bool:
    return no_text(specimen) or closed(specimen)


def no_sequence(specimen: Specimen) -> bool:
    """No image, or one whose tokens attend within windows."""
    return specimen.is_text or specimen.name == "swin"


SOME = ("llama", "bert", "vit")  # a decoder, an encoder, one of images
PARTS: tuple[tuple[str, Method], ...] = (
    ("part-low", LoRA(rank=3, alpha=5)),
    ("part-gain", IA3(targets="attn.v in:mlp.down")),
    ("part-input", LoRA(rank=2, targets="in:attn.o attn.v mlp.up")),
)
NAMES = tuple(name for name, _ in PARTS)

CASES: tuple[Case, ...] = (
    Case("lora", LoRA(rank=3, alpha=5)),
    Case("lora-all", LoRA(rank=3, alpha=5, targets="all-linear")),
    Case("lora-input", LoRA(rank=2, alpha=3, targets="in:mlp.down in:attn.o"), refused=experts),
    Case("lora-head", LoRA(rank=2, alpha=3, targets="head attn.k")),
    Case("lora-embed", LoRA(rank=2, alpha=3, targets="embed mlp.up"), refused=no_table),
    Case("lora-patch", LoRA(rank=2, alpha=3, targets="patch mlp.up"), refused=text),
    Case("lora-energy", LoRA(energy=0.9), refused=lambda _: True),  # of kitout.combine: no new adapter has it
    Case("lora-last", LoRA(rank=60, targets="attn.* mlp.*", layers="last:1", clip_rank=False), refused=experts),
    Case(
        "lora-roles",
        LoRA(rank={"attn.*": 2, "mlp.*": 4}, alpha={"*.*": 3, "mlp.*": 7}, targets="attn.* mlp.*"),
        refused=experts,
    ),
    Case("lora-dropout", LoRA(rank=2, dropout=0.3)),
    Case("rslora", LoRA(rank=4, alpha=3, rslora=True)),
    Case("lora-biases", LoRA(rank=2, alpha=3, targets="attn.q", bias="all", lora_bias=True)),
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
    *(
        Case(name, method, refused=no_front, mixes=False, strengths=False, counts=counts)
        for name, method, counts in (
            ("prompt", PromptTuning(length=3), talks),
            ("prompt-after", PromptTuning(length=2, place="after", init="normal", stacks="decoder"), decoder),
            ("prompt-labels", PromptTuning(length=4, init=((7, 8), (9,)), stacks="both"), talks),
            ("prompt-text", PromptTuning(length=5, init=(11, 12, 13), place="after"), talks),
        )
    ),
    Case(
        "prompt-pooled",
        PromptTuning(length=2, pooled="prompt"),
        refused=lambda specimen: specimen.kind != "encoder",
        mixes=False,
        strengths=False,
    ),
    *(
        Case(name, method, refused=closed, mixes=False, eager=in_interface, counts=talks)
        for name, method in (
            ("prefix", PrefixTuning(length=5)),
            ("prefix-mlp", PrefixTuning(length=6, encoder=7)),
            ("prefix-mlps", PrefixTuning(length=5, encoder=5, shared=False, dropout=0.2)),
            ("prefix-last", PrefixTuning(length=6, layers="last:1", places="encoder decoder")),
        )
    ),
    Case("prefix-cross", PrefixTuning(length=4, places="cross"), refused=uncrossed, mixes=False),
    Case(
        "prefix-text",
        PrefixTuning(length=5, init=(11, 12, 13, 14, 15)),
        refused=no_tokens_or_closed,
        mixes=False,
        counts=talks,
    ),
    *(
        Case(name, method, refused=no_sequence, mixes=False, strengths=False)
        for name, method in (
            ("vpt", VPT(length=4)),
            ("vpt-deep", VPT(length=3, deep=True)),
            ("vpt-last", VPT(length=2, deep=True, layers="last:2", projection=6, dropout=0.2)),
            ("vpt-shared", VPT(length=3, deep=True, share=True)),
        )
    ),
    Case("partial-names", PartialFineTuning(names="*.1.*"), by_row=not_relative, refused=one_block),
    Case(
        "mam",
        MAM(prefix=5, width=6, scale="learned"),
        refused=closed,
        mixes=False,
        eager=in_interface,
        counts=talks,
        composes=True,
    ),
    *(
        Case(name, Composition(route=route), parts=PARTS, refused=experts, trains=False, composes=True)
        for name, route in (
            ("composition", Stack("part-low", Mix({"part-gain": 0.6, "part-input": -0.4}))),
            ("only", Stack(Only("part-input", layers="last:1"), Only("part-low", layers="0"))),
        )
    ),
    Case(
        "average",
        Composition(route=Average({"part-low": 0.4, "part-gain": 0.6}, of="logits")),
        parts=PARTS,
        refused=experts,
        by_row=lambda specimen: False,
        mixes=False,
        strengths=False,
        trains=False,
        composes=True,
    ),
    *(
        Case(name, method, parts=PARTS, refused=experts, composes=True)
        for name, method in (
            ("mixture", Mixture(of=NAMES, per="layer", init=(0.5, 0.3, 0.2), softmax=True)),
            ("fusion", Fusion(of=NAMES, dropout=0.1, penalty=0.1)),
            ("gated", Gated(of=NAMES)),
        )
    ),
    Case("mixture-sites", Mixture(of=NAMES, per="site"), parts=PARTS, composes=True, only_on=("llama",)),
    Case("lora-adaptive", LoRA(rank=2, alpha=3, adaptive=True, start=2.0)),
    Case("lora-eva", LoRA(rank=2, alpha=3, targets="all-linear", init="eva"), only_on=SOME),
    Case("lora-ga", LoRA(rank=2, alpha=3, targets="attn.q mlp.*", init="loraga"), rounds=True, only_on=SOME),
)

Cell = tuple[Specimen, Case]


def _costly(cells: list[Cell]) -> list[Cell]:
    """The cells without most of the compositions: all of those on `SOME`, on the others one after the other."""
    composing = {s.name: [c for o, c in cells if o is s and c.composes] for s, _ in cells if s.name not in SOME}
    turn = {name: cases[i % len(cases)] for i, (name, cases) in enumerate(composing.items()) if cases}
    return [(s, c) for s, c in cells if not c.composes or s.name in SOME or c is turn[s.name]]


CELLS: list[Cell] = [(s, c) for s in SPECIES.values() for c in CASES if c.is_tried_on(s) and not c.refused(s)]
TRAINED = [(s, c) for s, c in CELLS if c.trains]
COSTLY = _costly(CELLS)
REFUSED = [(s, c) for s in SPECIES.values() for c in CASES if c.is_tried_on(s) and c.refused(s)]


def name_of(value: object) -> str | None:
    """pytest's id for a specimen or a case."""
    return getattr(value, "name", None)
