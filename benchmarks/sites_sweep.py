"""Counts in how many of transformers' model types the finder labels every block, on the meta device.

`python benchmarks/sites_sweep.py [--write] [--only TYPE ...]` builds every config class of the installed transformers
(layers and experts shrunk), surveys it, and judges it by a rule of its own: it reads roles of sites, never the
finder's verdict on itself. The fixed list attention_stacks.txt is the denominator, so that a stack which is no longer
found counts as a miss. Misses, hybrids, types outside the list and failed builds are listed by name.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedModel, logging

from kitout.base.find.find import find_sites
from kitout.base.survey import Block, Survey
from kitout.errors import NoBlocksFound

HERE = Path(__file__).parent
PROCESSES, SECONDS = 2, 60
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
          "num_encoder_layers", "num_decoder_layers")  # fmt: skip
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
LEAST = 488  # of the fixed list
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Result:
    """One model type. state: full | part | no stack | no class | fails."""

    name: str
    state: str
    resolved: int = 0
    blocks: int = 0
    note: str = ""
    hybrids: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table to SITES.md beside this file")
    parser.add_argument("--only", nargs="*", help="these model types only")
    options = parser.parse_args()
    started, results = time.time(), []
    names = options.only or list(CONFIG_MAPPING.keys())
    with multiprocessing.get_context("fork").Pool(PROCESSES, maxtasksperchild=50) as pool:
        for result in pool.imap_unordered(examine, names):
            results.append(result)
            if len(results) % 50 == 0:
                print(f"{len(results)} of {len(names)} types, {time.time() - started:.0f} s", flush=True)
    results.sort(key=lambda r: r.name)
    fixed = [name for name in listed() if not options.only or name in options.only]
    text = report(results, fixed)
    print(text)
    if options.write:
        (HERE / "SITES.md").write_text(text, encoding="utf-8")
    if not options.only and sum(r.state == "full" and r.name in set(fixed) for r in results) < LEAST:
        raise SystemExit(f"fewer than {LEAST} of the fixed list")


def listed() -> list[str]:
    return (HERE / "attention_stacks.txt").read_text(encoding="utf-8").split()


def examine(name: str) -> Result:
    """Build and judge one type, within its time."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(SECONDS)
    try:
        return judge(name, find_sites(build(name)))
    except NoBlocksFound:
        return Result(name, "no stack")
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        reason = re.sub(r" from '/[^']*'", "", reason).partition("You can install")[0]
        unknown = "Unrecognized configuration class" in reason
        return Result(name, "no class" if unknown else "fails", note=reason[:140])
    finally:
        signal.alarm(0)


def _late(_signal: int, _frame: FrameType | None) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def build(name: str) -> PreTrainedModel:
    """The type's default model on the meta device: shallow where its config allows that, else as it is."""
    config = CONFIG_MAPPING[name]()
    for attribute in (*DEPTHS, *EXPERTS):
        _shrink(config, attribute)
    with torch.device("meta"):
        try:
            return AutoModel.from_config(config)
        except TimeoutError:
            raise
        except Exception:  # a list of layer types, say, that no longer fits
            return AutoModel.from_config(CONFIG_MAPPING[name]())


def _shrink(config: Any, attribute: str) -> None:
    try:
        if isinstance(getattr(config, attribute, None), int) and getattr(config, attribute) > 4:
            setattr(config, attribute, 4)
    except Exception:  # some configs refuse: their depth is a property
        return


def judge(name: str, found: Survey) -> Result:
    """Stacks of which every block attends count; hybrids are told apart, for their other blocks have no attention."""
    towers: dict[str, list[Block]] = {}
    for block in found.blocks:
        towers.setdefault(block.tower, []).append(block)
    whole = [block for blocks in towers.values() if all(b.has_attention for b in blocks) for block in blocks]
    hybrids = [
        f"{tower}: {sum(b.has_attention for b in blocks)} of {len(blocks)} blocks attend, "
        f"{sum(map(good, blocks))} resolved"
        for tower, blocks in towers.items()
        if not all(b.has_attention for b in blocks)
        for good in [lambda b: labelled(found, b)]
    ]
    bad = [block for block in whole if not labelled(found, block)]
    state = "no stack" if not found.blocks else "part" if bad or not whole else "full"
    note = f"{bad[0].path} has {', '.join(sorted(roles(found, bad[0]))) or 'no role'}" if bad else ""
    return Result(name, state, len(whole) - len(bad), len(whole), note, hybrids)


def roles(found: Survey, block: Block) -> set[str]:
    mine = (s for s in found.sites if s.tower == block.tower and s.layer == block.index)
    return {s.role for s in mine if s.role.startswith(("attn.", "cross.", "mlp."))}


def labelled(found: Survey, block: Block) -> bool:
    """The rule: (q, k, v or a fused projection, or q and k) and o, and (up or gate, and down, or 3-D experts)."""
    here = roles(found, block)
    reads = any(f"{kind}.qkv" in here or {f"{kind}.q", f"{kind}.k"} <= here for kind in ("attn", "cross"))
    feeds = "mlp.down" in here and bool({"mlp.up", "mlp.gate"} & here)
    return reads and bool({"attn.o", "cross.o"} & here) and (feeds or has_experts(found, block))


def has_experts(found: Survey, block: Block) -> bool:
    if not block.is_one_module:
        return False
    inside = (m for m in found.model.get_submodule(block.path).modules() if not isinstance(m, CONVS))
    return any(p.ndim == 3 for m in inside for p in m.parameters(recurse=False))


def report(results: list[Result], fixed: list[str]) -> str:
    """The whole result as Markdown."""
    by_name = {r.name: r for r in results}
    full = [n for n in fixed if by_name.get(n) and by_name[n].state == "full"]
    missed = [by_name.get(n) or Result(n, "fails", note="not in this transformers") for n in fixed if n not in full]
    others = [r for r in results if r.name not in set(fixed)]
    count = Counter(r.state for r in results)
    head = (
        f"transformers {version('transformers')}, torch {torch.__version__}, default configs on the meta device, "
        f"{len(results)} config classes. Made by `python benchmarks/sites_sweep.py --write`. Layers are cut to 4, so a "
        "hybrid whose first four blocks are state-space ones counts as having no stack."
    )
    rule = (
        f"**{len(full)} of {len(fixed)}** types of the fixed list are fully resolved: in every block of every stack "
        "the query, key and value (or a fused projection), the output, and the feed-forward (or experts in 3-D "
        "parameters) are labelled."
    )
    lines = [
        "# Sites found in transformers' model types",
        "",
        head,
        "",
        rule,
        "",
        "All config classes: " + ", ".join(f"{state} {count[state]}" for state in sorted(count)) + ".",
        *_table("Misses of the fixed list", missed),
        *_table("Outside the list: resolved", (r for r in others if r.state == "full")),
        *_table("Outside the list: in part", (r for r in others if r.state == "part")),
        *_table("No stack found", (r for r in others if r.state == "no stack")),
        *_hybrids(results),
        *_table("Fail to build", (r for r in others if r.state == "fails")),
        "",
        "## Config classes without a model of their own",
        "",
        "Parts of composite configs, which AutoModel does not build: "
        + ", ".join(r.name for r in others if r.state == "no class")
        + ".",
        "",
    ]
    return "\n".join(lines)


def _table(title: str, rows: Iterable[Result]) -> list[str]:
    rows = list(rows)
    head = ["", f"## {title} ({len(rows)})", ""]
    if not any(r.note for r in rows):
        return [*head, ", ".join(f"{r.name} {r.resolved}/{r.blocks}" if r.blocks else r.name for r in rows) or "none"]
    body = [
        f"| {r.name} | {f'{r.resolved}/{r.blocks}' if r.blocks else ''} | {r.note.replace('|', '/')} |" for r in rows
    ]
    return [*head, "| type | blocks | reason |", "|---|---|---|", *body]


def _hybrids(results: list[Result]) -> list[str]:
    rows = [f"| {r.name} | {line} |" for r in results for line in r.hybrids]
    text = "Stacks of which only some blocks hold attention. They are found, and are no part of the count above."
    return ["", f"## Hybrid stacks ({len(rows)})", "", text, "", "| type | stack |", "|---|---|", *rows]


if __name__ == "__main__":
    main()
