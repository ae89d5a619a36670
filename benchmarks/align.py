"""RLHF on one base: steps of GRPO and DPO against TRL, four roles in one call, and the memory of PPO.

Policy, base, reward and value score the same rows: three LoRAs (r=8 on every linear) on a Llama of 6 layers, d 384;
half of each row's tokens are targets. All shapes run in the same rounds. Times are processor time; steps run on one
thread, since a second one's waiting would count. "Plain calls" are what `roles` replaces: `kit.use` and the model's own
output, logits at every position. Steps and memory are of the stages in `align_stages`. LINES="grpo dpo roles memory"
are all, SHAPE=smollm2 is the larger model of its two, PEER="bfloat16 eager" saves the search for TRL's fastest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import align_stages as stages
import torch
from align_stages import PAIRS, PROMPTS, SAMPLES, Case
from common import Line, Times, interleaved, one_thread, smollm2
from training import TUNINGS, Tuning
from transformers import LlamaConfig, LlamaForCausalLM

import kitout
from kitout import Kit, LoRA
from kitout.align.roles import JOINT_TOKENS, roles
from kitout.align.scalar_head import head_path, scalar_head
from kitout.train.objectives.objective import Batch

WANTED = {"policy": "tokens", None: "tokens", "taste": "last", "value": "all"}
# Rows and tokens of the batch that every role scores, and the most that a call may take of separate passes.
SHAPES = {(1, 32): 0.60, (2, 64): 0.90, (8, 64): 1.02}


PEER_LIMITS = {"grpo": 0.65, "dpo": 0.60}  # a step of ours against TRL's fastest
SHAPE, PEER = os.environ.get("SHAPE", "d256"), os.environ.get("PEER")


def run(rounds: int = 2) -> Iterator[Line]:
    lines = {"grpo": _grpo, "dpo": _dpo, "roles": lambda _: _four_roles(15), "memory": lambda _: _memory()}
    for name in os.environ.get("LINES", "grpo dpo roles memory").split():
        yield from lines[name](rounds)


# ---- steps against TRL ---------------------------------------------------------------------------------------------


def _grpo(rounds: int) -> Iterator[Line]:
    folder = stages.folder_of(SHAPE)
    peers = {str(tuning): stages.grpo_peer(folder, tuning) for tuning in _tunings()}
    fastest, tried = _fastest(peers)
    ours = stages.kitout_case(stages.stage_config("grpo", folder, loss={"beta": 0.04}))
    times = _in_turn({"kitout": ours, "TRL": peers[fastest]}, rounds)
    yield _against(
        times, "TRL", "grpo",
        f"GRPO step, {PROMPTS} x {SAMPLES} answers of {stages.ANSWER} behind {stages.PROMPT}, {SHAPE}, against TRL",
        f"kitout {ours.note}; {tried}",
    )  # fmt: skip


def _dpo(rounds: int) -> Iterator[Line]:
    folder = stages.folder_of(SHAPE)
    peers = {str(tuning): stages.dpo_peer(folder, tuning) for tuning in _tunings()}
    fastest, tried = _fastest(peers)
    tuning = next(one for one in TUNINGS if str(one) == fastest)
    ours = stages.kitout_case(stages.stage_config("dpo", folder))
    kept, in_graph = stages.reference_passes(ours)
    cases = {
        "kitout": ours, "TRL": peers[fastest], "TRL precomputed": stages.dpo_peer(folder, tuning, is_precomputed=True),
        "kept": kept, "in graph": in_graph,
    }  # fmt: skip
    times = _in_turn(cases, rounds)
    of = f"{PAIRS} pairs x {stages.PROMPT + stages.ANSWER}, {SHAPE}"
    for peer, name in {"TRL": "TRL", "TRL precomputed": "TRL with precomputed reference"}.items():
        yield _against(
            times, peer, "dpo", f"DPO step, reference kept, {of}, against {name}", f"kitout {ours.note}; {tried}"
        )
    ratio = times.ratio("kept", "in graph")
    memory = stages.saved_bytes(kept), stages.saved_bytes(in_graph)
    share = memory[0] / memory[1]
    yield Line(
        f"DPO forward and backward, reference kept against in the graph, {of}: time, bytes saved for backward",
        f"{ratio:.3f} x, {share:.3f} x", "<= 0.60 x, <= 0.60 x", ratio <= 0.60 and share <= 0.60,
        f"{times.best('kept') * 1e3:.0f} ms, {times.best('in graph') * 1e3:.0f} ms; "
        f"{memory[0] / 2**20:.0f} MiB, {memory[1] / 2**20:.0f} MiB",
    )  # fmt: skip


def _against(times: Times, peer: str, kind: str, metric: str, detail: str) -> Line:
    limit = PEER_LIMITS[kind]
    ratio = times.ratio("kitout", peer)
    seconds = f"kitout {times.best('kitout'):.2f} s, {peer} {times.best(peer):.2f} s"
    return Line(metric, times.ratio_text("kitout", peer), f"<= {limit:.2f} x", ratio <= limit, f"{seconds}; {detail}")


def _tunings() -> list[Tuning]:
    return [tuning for tuning in TUNINGS if PEER in (None, str(tuning))]


def _fastest(peers: Mapping[str, Case]) -> tuple[str, str]:
    """The settings whose step is the shortest in a short run of each, and the seconds of all. PEER: found before."""
    if PEER:
        return PEER, f"TRL {PEER}"
    with one_thread():
        seconds = {name: min(case(steps=3)) for name, case in peers.items()}
    tried = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    return min(seconds, key=lambda name: seconds[name]), f"TRL tried, s: {tried}"


def _in_turn(cases: Mapping[str, Case], rounds: int) -> Times:
    """Every step of every run: the cases run in turn, so many times."""
    times = Times({name: [] for name in cases})
    with one_thread():
        for _ in range(rounds):
            for name, case in cases.items():
                times.rounds[name] += case(steps=stages.STEPS)
    return times


# ---- memory --------------------------------------------------------------------------------------------------------


def _memory() -> Iterator[Line]:
    """Each case in a process of its own, over one folder; PPO starts from an sft and a reward adapter."""
    yield _weights()
    folder = stages.folder_of(SHAPE)
    found = {}
    for case in ("parents", "sft", "ppo"):
        command = [sys.executable, str(Path(stages.__file__)), case, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        found[case] = json.loads(done.stdout.strip().splitlines()[-1])
    ppo, sft = found["ppo"], found["sft"]
    ratio = ppo["peak"] / sft["peak"]
    above = ", ".join(f"{name} {one['above_loaded'] / 2**20:,.0f}" for name, one in (("PPO", ppo), ("SFT", sft)))
    yield Line(
        f"PPO peak, rollout and update, {SHAPE}, against SFT with as many rows x tokens",
        f"{ratio:.3f} x", "<= 1.30 x", ratio <= 1.3,
        f"above the process without a model: PPO {ppo['peak'] / 2**20:,.0f} MiB, SFT {sft['peak'] / 2**20:,.0f} MiB; "
        f"above the loaded model: {above} MiB ({ppo['above_loaded'] / sft['above_loaded']:.2f} x)",
    )  # fmt: skip


def _weights() -> Line:
    """Four adapters on SmolLM2: policy, reference, reward and value, the last two with a scalar head."""
    shares = {}
    for dtype in (torch.float32, torch.bfloat16):
        kit = kitout.attach(smollm2(dtype))
        base = stages.size_of(kit.base.parameters())
        for name in ("policy", "reference", "reward", "value"):
            heads = {head_path(kit): scalar_head(kit, 0)} if name in ("reward", "value") else None
            kit.add(name, LoRA(rank=stages.RANK, targets="all-linear"), heads=heads)
        shares[dtype] = 1 + sum(stages.size_of(kit[name].parameters()) for name in kit.names) / base
    return Line(
        "PPO, base and adapters of policy, reference, reward and value in memory, SmolLM2 float32, against the base",
        f"{shares[torch.float32]:.3f} x", "<= 1.10 x", shares[torch.float32] <= 1.1,
        f"bfloat16 base with float32 adapters {shares[torch.bfloat16]:.3f} x",
    )  # fmt: skip


# ---- four roles ----------------------------------------------------------------------------------------------------


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
