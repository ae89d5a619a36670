"""RLHF on one base: what four roles of one batch cost in one call, against one pass per role.

Policy, base, reward and value score the same rows: three LoRAs (r=8 on every linear) on a Llama of 6 layers, d 384;
half of each row's tokens are targets. All shapes run in the same rounds; times are processor time. "Plain calls" are
what `roles` replaces: `kit.use` and the model's own output, logits at every position.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from common import Line, Times, interleaved
from transformers import LlamaConfig, LlamaForCausalLM

import kitout
from kitout import Kit, LoRA
from kitout.align.roles import JOINT_TOKENS, roles
from kitout.align.scalar_head import head_path, scalar_head
from kitout.train.objectives.objective import Batch

WANTED = {"policy": "tokens", None: "tokens", "taste": "last", "value": "all"}
# Rows and tokens of the batch that every role scores, and the most that a call may take of separate passes.
SHAPES = {(1, 32): 0.60, (2, 64): 0.90, (8, 64): 1.02}


def run(rounds: int = 30) -> list[Line]:
    return list(_four_roles(rounds))


def _four_roles(rounds: int) -> Iterator[Line]:
    kit = _kit_with_roles()
    times = _times({shape: _batch(kit, *shape) for shape in SHAPES}, kit, rounds)
    for (rows, tokens), limit in SHAPES.items():
        auto, joint, separate, plain = (f"{rows} x {tokens} {how}" for how in ("auto", "joint", "separate", "plain"))
        chosen = "one pass" if rows * tokens <= JOINT_TOKENS else "four passes"
        yield Line(
            f"four roles in one call, 4 x {rows} x {tokens}, against four passes",
            times.ratio_text(auto, separate),
            f"<= {limit:.2f} x",
            times.ratio(auto, separate) <= limit,
            f"{chosen} chosen; one pass {times.ratio(joint, separate):.3f} x; "
            f"four {times.best(separate) * 1e3:.0f} ms; {times.ratio(auto, plain):.3f} of four plain calls",
        )


def _times(batches: dict[tuple[int, int], Batch], kit: Kit, rounds: int) -> Times:
    def call(batch: Batch, how: str) -> Callable[[], object]:
        if how == "plain":
            return lambda: _plain_calls(kit, batch)
        return lambda: roles(kit, batch, WANTED, how)  # type: ignore[arg-type]

    cases = {
        f"{rows} x {tokens} {how}": call(batch, how)
        for (rows, tokens), batch in batches.items()
        for how in ("auto", "joint", "separate", "plain")
    }
    return interleaved(cases, rounds, warm=2, clock=time.process_time)


@torch.no_grad()
def _plain_calls(kit: Kit, batch: Batch) -> list[torch.Tensor]:
    positions, labels = batch.targets["positions"], batch.targets["labels"]
    found = []
    for role, answer in WANTED.items():
        with kit.use(role):
            output = kit(**batch.inputs, use_cache=False).logits.flatten(0, 1)
        is_scalar = answer != "tokens"
        found.append(output[:, 0] if is_scalar else output[positions].log_softmax(-1).gather(1, labels[:, None]))
    return found


def _kit_with_roles() -> Kit:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    kit = kitout.attach(LlamaForCausalLM(config)).eval()
    for seed, (name, answer) in enumerate((name, WANTED[name]) for name in ("policy", "taste", "value")):
        heads = None if answer == "tokens" else {head_path(kit): scalar_head(kit, seed)}
        kit.add(name, LoRA(rank=8, targets="all-linear"), seed=seed, heads=heads)
    with torch.no_grad():
        for value in kit.parameters():
            value.normal_(0.0, 0.02)
    return kit


def _batch(kit: Kit, rows: int, tokens: int) -> Batch:
    ids = torch.randint(1, 4096, (rows, tokens), generator=torch.Generator().manual_seed(0), device=kit.device)
    positions = torch.cat([torch.arange(tokens // 2 - 1, tokens - 1) + r * tokens for r in range(rows)])
    targets = {"positions": positions, "labels": ids.flatten()[positions + 1]}
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, targets, rows, ids.numel(), ids.numel())
