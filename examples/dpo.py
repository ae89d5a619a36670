"""A reward model and DPO on pairs, then both asked about an answer on one base (docs/align.md, in Python).

Correct and incorrect answers to short questions take the place of your pairs. `python examples/dpo.py [FOLDER]`; some
minutes on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

import kitout
from kitout.align.roles import roles
from kitout.data.encode.item import EncodedExample
from kitout.train.objectives.answer_rows import collate_rows


def main(folder: Path) -> None:
    """Everything below one folder."""
    pairs = {"train": {"path": "nq-pairs", "limit": 300}, "validation": 0, "test": 60}
    for stage in ("reward", "dpo"):
        result = kitout.align(
            stage=stage, model="smollm2-135m", data=pairs, train={"steps": 40, "batch_size": 8},
            output=str(folder / stage),
        )  # fmt: skip
        print(stage, result.comparisons[stage].verdict)
    predictor = kitout.load(folder / "dpo")
    kit, tokenizer, policy = predictor.kit, predictor.tokenizer, predictor.names[0]
    kit.load(folder / "reward" / "adapter", name="taste")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    for answer in ("Paris", "a kind of cheese"):
        ids = tokenizer(answer)["input_ids"]
        row = EncodedExample((*prompt, *ids), (*[-100] * len(prompt), *ids))
        batch = collate_rows([row], kit.device)
        said = roles(kit, batch, {policy: "tokens", None: "tokens", "taste": "last"})
        ratio = (said[policy] - said[None]).sum().item()
        print(f"{answer:>16}  reward {said['taste'].item():.2f}  log-ratio of policy to base {ratio:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/dpo"))
