"""What a stage may not change: the base, its reference, an adapter that judges; and the modes of all modules."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import kitout
from align.test_run import data_of, stage
from kitout import LoRA
from kitout.align import run as stages
from kitout.align.scalar_head import head_path, scalar_head
from kitout.train.setup.prepare import PreparedRun
from tiny_models import decoder
from train.fixtures import add

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, an adapter to start from and one that judges."""
    folder = tmp_path_factory.mktemp("frozen")
    model = decoder(folder / "model")
    kit = kitout.attach(AutoModelForCausalLM.from_pretrained(model))
    add(kit, "start", LoRA(rank=2))
    add(kit, "taste", LoRA(rank=2, targets="mlp.down"), {head_path(kit): scalar_head(kit, 1)})
    for name in kit.names:
        kit.save(name, folder / name)
    return {name: folder / name for name in ("model", *kit.names)}


def digests(prepared: PreparedRun) -> dict[str, str]:
    """Of everything that is not trained: the base with its buffers, and adapters that are no job's."""
    kit, trained = prepared.kit, {"value", *(job.name for job in prepared.jobs)}
    frozen: dict[str, Any] = {name: kit[name] for name in kit.names if name not in trained}
    return {name: digest_of(module) for name, module in {**frozen, "": kit.base}.items()}


def digest_of(module: torch.nn.Module) -> str:
    hashed = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        hashed.update(name.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


KINDS = ["reward", "dpo", "orpo", "simpo", "kto", "grpo", "rloo", "ppo"]


@pytest.mark.parametrize(
    "kind", [kind if kind in ("dpo", "ppo") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_a_stage_changes_nothing_but_what_it_trains(
    kind: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    modes: list[list[bool]] = []
    run_prepared, write_outputs = stages._run_prepared, stages.write_outputs

    def begin(work: Any, config: Any, prepared: PreparedRun, *rest: Any) -> Any:
        before.update(digests(prepared))
        modes.append([module.training for module in prepared.kit.modules()])
        return run_prepared(work, config, prepared, *rest)

    def end(prepared: PreparedRun, *rest: Any) -> Any:
        after.update(digests(prepared))
        modes.append([module.training for module in prepared.kit.modules()])
        return write_outputs(prepared, *rest)

    monkeypatch.setattr(stages, "_run_prepared", begin)
    monkeypatch.setattr(stages, "write_outputs", end)
    settings: dict[str, Any] = {"from": str(folders["start"])}
    expected = {""}
    if kind in ("grpo", "rloo", "ppo"):
        settings |= {"reward": str(folders["taste"]), "loss": {"beta": 0.05}}
        expected |= {"reward-0"}
    if kind != "reward":  # what a policy starts from is kept to be compared with, reference or not
        expected |= {"reference"}
    stage(kind, folders["model"], data_of(kind, tmp_path), tmp_path / "run", **settings)
    assert before.keys() == expected
    assert after == before
    assert modes[0] == modes[1]
