"""(b) The training loop's step with its own loss: SmolLM2-135M, LoRA r=8 all-linear, a quarter of the tokens trained.

The step is the loop's: batch, forward, loss at the trained positions, backward, clipping, AdamW. The floor is forward
and backward of the frozen model to its embeddings with that same loss. PEFT's step has the whole logits, as its users
have them. Rows are random, so no two begin alike. All have the attention that `kitout train` chooses at this length.
Memory is the peak above the loaded model, each case in a process of its own. `python benchmarks/loop_step.py CASE NAME`
prints one.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable

import torch
from common import SMOL, Line, Times, interleaved, share_of_peak, smollm2
from train_step import CASES, same_values, step

import kitout
from kitout import LoRA
from kitout.base import memory
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.train.config.schema import TrainConfig
from kitout.train.loop.base_mode import training_mode
from kitout.train.loop.jobs import Job, build_optimizer, clip_grad_norm
from kitout.train.loop.step import StepRunner
from kitout.train.objectives.causal_lm import CausalLM
from kitout.train.objectives.lm_head_loss import HeadLoss
from kitout.train.objectives.objective import Batch
from kitout.train.setup.base_model import EAGER_BELOW_TOKENS

TRAINED = 0.25  # of the tokens of each row, its last ones
LIMITS = {"floor": 1.08, "peft": 0.60}
MOST_MEMORY = 0.05  # above the floor's
Case = Callable[[], float]


def examples(rows: int, tokens: int) -> list[EncodedExample]:
    ids = torch.randint(0, SMOL.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    prompt = tokens - int(TRAINED * tokens)
    return [EncodedExample(tuple(row), (*[IGNORE_INDEX] * prompt, *row[prompt:]), prompt_length=prompt) for row in ids]


def base(name: str) -> torch.nn.Module:
    _, tokens, dtype = CASES[name]
    model = smollm2(dtype).eval()
    model.set_attn_implementation("eager" if tokens < EAGER_BELOW_TOKENS else "sdpa")
    return model


def loop(name: str) -> tuple[Case, kitout.Kit]:
    """`StepRunner` and what `JobTrainer` does around it."""
    rows, tokens, _ = CASES[name]
    kit, items = kitout.attach(base(name)), examples(rows, tokens)
    kit.add("a", LoRA(rank=8, alpha=16, targets="all-linear"))
    kit.train_only("a")
    objective = CausalLM(kit)
    with kit.use("a"):
        objective.choose_head_loss(["a"], items)
    settings = TrainConfig(lr=1e-5, batch_size=rows)
    job = Job("a", objective, items, [list(range(rows))], settings)
    runner, optimizer = StepRunner(kit, [job], rows), build_optimizer([job], [kit["a"]])
    parameters = list(kit["a"].parameters())

    def run() -> float:
        with training_mode(kit, ["a"], False):
            loss = runner.step(
                kit, [(0, i) for i in range(rows)], 0, torch.Tensor.backward, lambda _: contextlib.nullcontext()
            )
        clip_grad_norm(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run, kit


def floor(name: str) -> Case:
    rows, tokens, _ = CASES[name]
    kit = kitout.attach(base(name))
    return frozen_step(kit, CausalLM(kit).collate(examples(rows, tokens), None))


def frozen_step(kit: kitout.Kit, batch: Batch) -> Case:
    """Forward, the loss at the trained positions, and backward to the embeddings."""
    kit.requires_grad_(False)
    head, positions, labels = HeadLoss(kit, "chunked"), batch.targets["positions"], batch.targets["labels"]
    weights = torch.full((len(labels),), 1 / len(labels))
    inputs = dict(batch.inputs)
    ids = inputs.pop("input_ids")

    def run() -> float:
        embedded = kit.base.get_input_embeddings()(ids).detach().requires_grad_()
        total, *_ = head(lambda: kit.base(inputs_embeds=embedded, **inputs), positions, labels, weights)
        total.backward()
        return total.item()

    return run


def peft(name: str, kit: kitout.Kit | None = None) -> Case:
    from peft import LoraConfig, get_peft_model

    rows, tokens, _ = CASES[name]
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    peer, items = get_peft_model(base(name), config), examples(rows, tokens)
    if kit is not None:
        same_values(peer, kit)
    ids, labels = (torch.tensor([getattr(item, key) for item in items]) for key in ("input_ids", "labels"))
    return step(peer, [p for p in peer.parameters() if p.requires_grad], ids, labels)


def measure(name: str, rounds: int) -> tuple[Times, dict[str, float]]:
    ours, kit = loop(name)
    cases = {"floor": floor(name), "peft": peft(name, kit), "kitout": ours}
    losses = {which: one() for which, one in cases.items()}
    return interleaved(cases, rounds, warm=0), losses


def peak(which: str, name: str) -> int:
    """Bytes above the loaded model, in a process of its own."""
    out = subprocess.run([sys.executable, __file__, which, name], capture_output=True, text=True, check=True).stdout
    return int(json.loads(out.strip().splitlines()[-1]))


def run(rounds: int = 8) -> list[Line]:
    lines = []
    for name, (rows, tokens, dtype) in CASES.items():
        times, losses = measure(name, rounds)
        detail = ", ".join(f"{case} {times.best(case):.3f} s" for case in times.rounds) + "; "
        detail += f"losses {', '.join(f'{k} {v:.5f}' for k, v in losses.items())}; "
        detail += share_of_peak(SMOL, rows * tokens / times.best("kitout"), dtype, rows * tokens)
        for to, limit in LIMITS.items():
            peer = {"floor": "the floor with the same loss", "peft": "PEFT's with whole logits"}[to]
            ratio = times.ratio("kitout", to)
            label = f"the loop's step, {name}, a quarter trained, against {peer}"
            lines.append(Line(label, times.ratio_text("kitout", to), f"<= {limit:.2f} x", ratio <= limit, detail))
            detail = ""
        lines.append(memory_line(name))
    return lines


def memory_line(name: str) -> Line:
    """What the loop holds beyond the frozen model's own step, its adapter, gradients and optimizer left out."""
    sizes = {which: peak(which, name) for which in ("floor", "kitout")}
    _, kit = loop(name)
    own = 4 * sum(value.nbytes for value in kit["a"].parameters())  # values, gradients and two moments
    above = (sizes["kitout"] - own - sizes["floor"]) / sizes["floor"]
    detail = ", ".join(f"{which} {size / 2**20:,.0f} MiB" for which, size in sizes.items())
    return Line(
        f"the loop's step, {name}, a quarter trained: peak memory above the floor's, besides adapter and optimizer",
        f"{above:+.1%}", f"<= {MOST_MEMORY:.0%}", above <= MOST_MEMORY,
        f"above the loaded model: {detail}; adapter and optimizer {own / 2**20:.0f} MiB",
    )  # fmt: skip


def main() -> None:
    which, name = sys.argv[1:]
    torch.set_num_threads(2)
    run_once = loop(name)[0] if which == "kitout" else floor(name) if which == "floor" else peft(name)
    device = torch.device("cpu")
    before = memory.current(device)
    memory.reset_peak(device)
    for _ in range(2):
        run_once()
    print(memory.peak(device) - before)


if __name__ == "__main__":
    main()
