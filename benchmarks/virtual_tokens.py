"""Prompt and prefix tuning against PEFT's: a training step at the same lengths and values, and time per new token.

Training: forward, backward and AdamW over the adapter, the same loss. Generation: greedy, with the adapter's prefix,
against PEFT with the same prefix and against the base alone with as many real tokens in its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from common import SMOL, Line, Times, interleaved, smollm2
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from train_step import step

import kitout
from kitout import PrefixTuning, PromptTuning

ROWS, TOKENS = 4, 128
STEPS = {"prompt p=20": 20, "prompt p=100": 100, "prefix m=20": 20, "prefix m=100": 100}
PREFIX, PROMPT, NEW = 20, 32, 48


def run(rounds: int = 5, blocks: int = SMOL.num_hidden_layers) -> Iterator[Line]:
    for name, length in STEPS.items():
        times, losses = train(name.split()[0], length, rounds, blocks)
        detail = ", ".join(f"{case} {times.best(case):.3f} s, loss {losses[case]:.5f}" for case in times.rounds)
        ratio = times.ratio("kitout", "peft")
        label = f"{name} step, {ROWS} x {TOKENS} fp32, against PEFT"
        yield Line(label, times.ratio_text("kitout", "peft"), "<= 0.95 x", ratio <= 0.95, detail)
    times, is_equal = generate(rounds, blocks)
    detail = ", ".join(f"{case} {times.best(case) / NEW * 1e3:.1f} ms" for case in times.rounds)
    detail += f" per token; tokens {'equal' if is_equal else 'NOT EQUAL'} to PEFT's"
    for to, limit in (("peft", 0.95), ("base", 1.03)):
        ratio = times.ratio("kitout", to)
        other = "PEFT" if to == "peft" else "the base with as many cached tokens"
        label = f"generation with a prefix of {PREFIX}, {ROWS} rows, per token, against {other}"
        yield Line(label, times.ratio_text("kitout", to), f"<= {limit:.2f} x", ratio <= limit, detail)
        detail = ""


def pair(kind: str, length: int, blocks: int) -> tuple[nn.Module, kitout.Kit]:
    """PEFT and kitout with the same values."""
    config = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig}[kind]
    peer = get_peft_model(smollm2(torch.float32, blocks), config(task_type="CAUSAL_LM", num_virtual_tokens=length))
    kit = kitout.attach(smollm2(torch.float32, blocks))
    kit.add("a", PromptTuning(length=length) if kind == "prompt" else PrefixTuning(length=length))
    kit.use("a")
    values = peer.prompt_encoder.default.embedding.weight.detach()
    with torch.no_grad():
        values.mul_(0.1)  # PEFT starts at N(0, 1), far from the model's embeddings
        if kind == "prompt":
            next(kit["a"].parameters()).copy_(values)
        else:
            site = kit["a"].sites[0]
            heads = site.num_kv_heads
            by_layer = values.view(length, -1, 2, heads, site.d_out // heads)  # [m, L, 2, H_kv, d_h]
            for layer, parameter in enumerate(kit["a"].parameters()):
                parameter.copy_(by_layer[:, layer])
    return peer, kit


def train(kind: str, length: int, rounds: int, blocks: int) -> tuple[Times, dict[str, float]]:
    peer, kit = pair(kind, length, blocks)
    vocabulary = kit.base.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    cases = {
        "peft": step(peer.train(), [p for p in peer.parameters() if p.requires_grad], ids),
        "kitout": step(kit.train(), list(kit["a"].parameters()), ids),
    }
    losses = {name: case() for name, case in cases.items()}
    return interleaved(cases, rounds, warm=0), losses


def generate(rounds: int, blocks: int) -> tuple[Times, bool]:
    peer, kit = pair("prefix", PREFIX, blocks)
    vocabulary = kit.base.get_input_embeddings().num_embeddings
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (ROWS, PROMPT), generator=rng)
    longer = torch.cat((torch.randint(0, vocabulary, (ROWS, PREFIX), generator=rng), ids), 1)
    peer.eval()
    kit.eval()
    base = smollm2(torch.float32, blocks).eval()
    cases = {
        "peft": greedy(peer.generate, ids),
        "kitout": greedy(kit.generate, ids),
        "base": greedy(base.generate, longer),
    }
    is_equal = torch.equal(cases["peft"]()[:, -NEW:], cases["kitout"]()[:, -NEW:])
    return interleaved(cases, max(rounds, 5), warm=1), is_equal


def greedy(generate_fn: Callable[..., Tensor], ids: Tensor) -> Callable[[], Tensor]:
    mask = torch.ones_like(ids)

    def run_once() -> Tensor:
        return generate_fn(
            input_ids=ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0
        )

    return run_once
