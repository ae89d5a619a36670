"""The base stays in eval mode while adapters train, recomputed activations are the same, evaluation is in eval mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kitout
from kitout import Houlsby, Kit, LoRA, PrefixTuning, PromptTuning
from kitout.base.eval_mode import eval_mode
from kitout.data.encode.item import EncodedExample
from kitout.errors import ConfigError
from kitout.train.loop.base_mode import training_mode
from kitout.train.loop.jobs import Job
from kitout.train.objectives.seq2seq_lm import Seq2SeqLM
from kitout.train.objectives.sequence import SequenceClassification
from train.fixtures import ALL, add, causal, far, gradients, job, kit_of, loop_of, texts
from zoo import ZOO

METHODS = {
    "low": LoRA(rank=2, targets="all-linear"), "serial": Houlsby(width=4), "front": PrefixTuning(length=3),
    "text": PromptTuning(length=2),
}  # fmt: skip


def with_dropout(species: str) -> Kit:
    """The species with every dropout of its config at 0.5."""
    config = ZOO[species].build().config if species in ZOO else ALL[species].build().config
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = type(ALL[species].build())(config)
    return kitout.attach(model)


def jobs_of(kit: Kit, species: str, names: Sequence[str]) -> list[Job]:
    if species == "bert":
        items = [EncodedExample(item.input_ids, label=n % 5) for n, item in enumerate(texts(8))]
        objective: Any = SequenceClassification(kit, "classification", 0)
    elif species in ("t5", "bart"):
        items = [
            EncodedExample(a.input_ids, target_ids=b.input_ids[:5]) for a, b in zip(texts(8), texts(8, 1), strict=True)
        ]
        objective = Seq2SeqLM(kit, ALL[species].pad_id)
        with kit.use(names[0]):
            objective.choose_head_loss(list(names), items)
    else:
        items = texts(8)
        objective = causal(kit, list(names), items)
    jobs = [job(name, objective, items, batch=8) for name in names]
    return [replace(one, batches=[list(range(8))] * 2) for one in jobs]


@pytest.mark.parametrize("species", ["llama", "gpt2", "opt", "bert", "t5", "bart"])
def test_checkpointing_gives_the_same_gradients_and_no_dropout_of_the_base(species: str) -> None:
    kit = with_dropout(species)
    kit.eval()
    names = ["low", "serial", "front"] if species in ("t5", "bart") else list(METHODS)
    for name in names:
        add(kit, name, METHODS[name], seed=len(name))
    jobs = jobs_of(kit, species, names)
    kit.train_only(*names)
    by_mode = {}
    for checkpointing in (False, True):
        for step in (0, 1):  # random draws would differ between them
            with training_mode(kit, names, checkpointing):
                by_mode[checkpointing, step] = gradients(kit, jobs, 8 * len(names), step)
    assert far(by_mode[True, 0], by_mode[False, 0]) <= 1e-6, "as without"
    assert all(torch.equal(by_mode[True, 0][key], value) for key, value in by_mode[True, 1].items()), "nothing is drawn"
    assert all(torch.equal(by_mode[False, 0][key], value) for key, value in by_mode[False, 1].items())
    assert not any(module.training for module in kit.base.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in kit.base.modules())
    assert not any(module._forward_hooks for module in kit.base.modules()), "no trace"


def test_checkpointing_saves_less_between_forward_and_backward() -> None:
    kit, items = kit_of("llama"), texts(8, low=60, high=60)
    add(kit, "low", LoRA(rank=2))
    one = job("low", causal(kit, ["low"], items), items, batch=8)
    saved_bytes = {}
    for checkpointing in (False, True):
        sizes: dict[int, int] = {}

        def pack(tensor: Any, sizes: dict[int, int] = sizes) -> Any:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        batch = one.objective.collate(items, None)
        with (
            training_mode(kit, ["low"], checkpointing),
            kit.use("low"),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        ):
            one.objective.losses(kit, batch, torch.ones(8))
        saved_bytes[checkpointing] = sum(sizes.values())
    assert saved_bytes[True] < saved_bytes[False] / 3


def test_the_adapters_own_dropout_is_the_same_when_recomputed() -> None:
    kit, items = kit_of("llama"), texts(8)
    add(kit, "low", LoRA(rank=2, dropout=0.5))
    jobs = [job("low", causal(kit, ["low"], items), items, batch=8)]
    kit.train_only("low")
    by_mode = {}
    for checkpointing in (False, True):
        with training_mode(kit, ["low"], checkpointing):
            by_mode[checkpointing] = gradients(kit, jobs, 8)
    assert far(by_mode[True], by_mode[False]) <= 1e-6
    assert far(gradients(kit, jobs, 8), by_mode[True]) > 1e-2, "outside training mode there is none"


def test_a_model_without_checkpointing_is_refused(tmp_path: Path) -> None:
    kit = kit_of("timm-vit")
    add(kit, "low", LoRA(rank=2))
    with pytest.raises(ConfigError, match=r"train\.activation_checkpointing=false"), training_mode(kit, ["low"], True):
        pass


@pytest.mark.parametrize("checkpointing", [False, True])
def test_evaluation_during_training_is_in_eval_mode(tmp_path: Path, checkpointing: bool) -> None:
    kit, items = with_dropout("gpt2"), texts(8)
    kit.eval()
    add(kit, "low", LoRA(rank=2, dropout=0.5))
    jobs = [job("low", causal(kit, ["low"], items), items, steps=3)]
    modes: list[set[bool]] = []

    def evaluate() -> dict[str, float]:
        modes.append({module.training for root in (kit, kit.base) for module in root.modules()})
        return {"eval_loss": 1.0}

    def record_training(module: nn.Module, *_: Any) -> None:
        modes.append({kit["low"].training, not kit.training})

    kit.base.register_forward_pre_hook(record_training)
    loop_of(
        kit,
        jobs,
        tmp_path,
        evaluate_fn=evaluate,
        eval_strategy="steps",
        eval_steps=1,
        activation_checkpointing=checkpointing,
    ).train()
    assert modes.count({False}) == 3
    assert modes.count({True}) >= 3


def test_eval_mode_restores_every_mode() -> None:
    kit = kit_of("llama")
    add(kit, "low", LoRA(rank=2, dropout=0.5))
    with training_mode(kit, ["low"], True):
        modes = [module.training for root in (kit, kit.base) for module in root.modules()]
        with eval_mode(kit.base, kit):
            with torch.no_grad(), kit.use("low"):
                kit(torch.tensor([[5, 6, 7]]))
            assert not any(module.training for root in (kit, kit.base) for module in root.modules())
        assert [module.training for root in (kit, kit.base) for module in root.modules()] == modes
        assert any(modes)
