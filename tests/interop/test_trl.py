"""TRL's trainers with a kit: they train the adapter alone, save a folder that loads, and share one base.

Each is TRL's own class on a tiny model and a few texts; the reference of a preference is checked by the first loss.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import kitout
from interop.fixtures import ARGUMENTS, bits, same
from kitout import Kit, LoRA, PrefixTuning, PromptTuning
from kitout.errors import ConfigError, RouteError
from laws.activate import run
from zoo import ZOO, out, tokenizer_of

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

TEXTS = [f"{word} is {word[::-1]}." for word in ("red", "green", "blue", "brown", "white", "black", "pink", "gray")]
PAIRS = {"prompt": TEXTS, "chosen": [" yes"] * 8, "rejected": [" no, not"] * 8}
METHODS = [LoRA(rank=2, targets="attn.q attn.v"), PrefixTuning(length=3), PromptTuning(length=3)]


def kit_of(species: str = "llama", method: Any = METHODS[0]) -> Kit:
    kit = kitout.attach(ZOO[species].build())
    kit.add("a", method, seed=1)
    kit.use("a")
    return kit


def settings(**more: Any) -> dict[str, Any]:
    return {**ARGUMENTS, "max_steps": 2, "bf16": False, "activation_checkpointing": False, **more}


def check_training(trainer: Any, kit: Kit, folder: Path, species: str = "llama") -> None:
    """The adapter moves, the base does not, the folder loads to the same values."""
    base = {key: value.clone() for key, value in kit.base.state_dict().items()}
    start = bits(kit, "a")
    trainer.train()
    assert not same(bits(kit, "a"), start)
    assert all(torch.equal(value, base[key]) for key, value in kit.base.state_dict().items())
    trainer.save_model(str(folder / "final"))
    other = kitout.attach(ZOO[species].build())
    other.load(folder / "final")
    with kit.use("a"), other.use("a"):
        batch = ZOO[species].batch(2, 0)
        assert torch.equal(run(kit, batch), run(other, batch))


def first_loss(trainer: Any) -> float:
    return float(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))


@pytest.mark.parametrize(
    ("method", "packing"), [(METHODS[0], False), (METHODS[0], True), (METHODS[1], False), (METHODS[2], False)],
    ids=["LoRA", "LoRA, packed", "prefix", "prompt"],
)  # fmt: skip
def test_sft(method: Any, packing: bool, tmp_path: Path) -> None:
    """The first loss is the one of the adapter's own logits: TRL runs the model without its head."""
    kit, rows = kit_of(method=method), datasets.Dataset.from_dict({"text": TEXTS})
    args = trl.SFTConfig(
        str(tmp_path), **settings(packing=packing, max_length=64, per_device_train_batch_size=2, shuffle_dataset=False)
    )
    trainer = trl.SFTTrainer(kit, args, train_dataset=rows, processing_class=tokenizer_of(ZOO["llama"]))
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    with torch.no_grad():
        kit.eval()
        plain = float(kit.base(**inputs).loss)
        assert float(trainer.compute_loss(kit, dict(batch))) == pytest.approx(plain, rel=1e-4)
    check_training(trainer, kit, tmp_path)


def test_reward(tmp_path: Path) -> None:
    species = "llama"
    config = ZOO[species].build().config
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    kit = kitout.attach(transformers.LlamaForSequenceClassification(config))
    kit.add("a", LoRA(rank=2), seed=1, heads={"score": nn.Linear(config.hidden_size, 1, bias=False)})
    kit.use("a")
    args = trl.RewardConfig(str(tmp_path), **settings())
    trainer = trl.RewardTrainer(
        kit, args, train_dataset=datasets.Dataset.from_dict(PAIRS), processing_class=tokenizer_of(ZOO[species])
    )
    start = bits(kit, "a")
    trainer.train()
    assert not same(bits(kit, "a"), start)


@pytest.mark.parametrize(
    ("method", "precompute"), [(METHODS[0], False), (METHODS[0], True), (METHODS[1], False)],
    ids=["LoRA", "LoRA, precomputed", "prefix"],
)  # fmt: skip
def test_dpo(method: Any, precompute: bool, tmp_path: Path) -> None:
    """A LoRA begins as the identity, so the first loss is log 2; a prefix does not."""
    kit = kit_of(method=method)
    args = trl.DPOConfig(str(tmp_path), **settings(precompute_ref_log_probs=precompute))
    trainer = trl.DPOTrainer(
        kit, kitout.reference(kit), args, train_dataset=datasets.Dataset.from_dict(PAIRS),
        processing_class=tokenizer_of(ZOO["llama"]),
    )  # fmt: skip
    check_training(trainer, kit, tmp_path)
    assert (first_loss(trainer) == pytest.approx(math.log(2), abs=1e-5)) == isinstance(method, LoRA)


def test_switching_dropout_off_reaches_the_base(tmp_path: Path) -> None:
    """DPOTrainer does by default: a policy in training mode would else differ from its reference at once."""
    config = ZOO["gpt2"].build().config
    config.resid_pdrop = config.attn_pdrop = config.embd_pdrop = 0.5
    kit, plain = (kitout.attach(transformers.GPT2LMHeadModel(config)) for _ in range(2))
    kit.add("a", LoRA(rank=2), seed=1)
    kit.use("a")
    trainer = trl.DPOTrainer(
        kit, kitout.reference(kit), trl.DPOConfig(str(tmp_path), **settings()),
        train_dataset=datasets.Dataset.from_dict(PAIRS), processing_class=tokenizer_of(ZOO["gpt2"]),
    )  # fmt: skip
    trainer.train()
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-5)
    trl.trainer.utils.disable_dropout_in_model(plain)
    assert all(m.p == 0 for m in plain.base.modules() if isinstance(m, nn.Dropout))


def test_kto(tmp_path: Path) -> None:
    kit, labels = kit_of(), [True, False] * 4
    trainer = trl.KTOTrainer(
        kit, kitout.reference(kit), trl.KTOConfig(str(tmp_path), **settings()),
        train_dataset=datasets.Dataset.from_dict({"prompt": TEXTS, "completion": [" yes"] * 8, "label": labels}),
        processing_class=tokenizer_of(ZOO["llama"]),
    )  # fmt: skip
    check_training(trainer, kit, tmp_path)
    assert first_loss(trainer) == pytest.approx(0.5, abs=1e-5)


def test_dpo_against_an_earlier_adapter(tmp_path: Path) -> None:
    kit = kit_of()
    with torch.no_grad():
        for parameter in kit["a"].parameters():
            parameter.normal_(std=0.2)
    kit.save("a", tmp_path / "sft")
    kit.load(tmp_path / "sft", name="sft")
    with pytest.raises(ConfigError, match="a reference must not move"):
        kitout.reference(kit, "sft")
    kit.train_only("a")
    trainer = trl.DPOTrainer(
        kit, kitout.reference(kit, "sft"), trl.DPOConfig(str(tmp_path), **settings()),
        train_dataset=datasets.Dataset.from_dict(PAIRS), processing_class=tokenizer_of(ZOO["llama"]),
    )  # fmt: skip
    trainer.train()
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_reinforcement_shares_the_base(name: str, tmp_path: Path) -> None:
    from kitout.interop import trl as ours

    kit = kit_of()
    args = getattr(trl, f"{name}Config")(
        str(tmp_path), **settings(num_generations=2, max_completion_length=4, beta=0.04, disable_dropout=True)
    )
    trainer = getattr(ours, f"{name}Trainer")(
        kit, lambda completions, **_: [float(sum(map(ord, c)) % 7) for c in completions], args,
        train_dataset=datasets.Dataset.from_dict({"prompt": TEXTS}), processing_class=tokenizer_of(ZOO["llama"]),
    )  # fmt: skip
    assert trainer.ref_model.base is kit.base
    assert (trainer.beta, args.beta) == (0.04, 0.04)
    check_training(trainer, kit, tmp_path)
    kls = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kls[0] == pytest.approx(0.0, abs=1e-5)
    assert kls[-1] != pytest.approx(0.0, abs=1e-7)


def test_what_would_edit_the_shared_base_is_refused(tmp_path: Path) -> None:
    from kitout.interop import trl as ours

    args = trl.GRPOConfig(str(tmp_path), **settings(num_generations=2, beta=0.04, sync_ref_model=True))
    with pytest.raises(ConfigError, match="sync_ref_model=True"):
        ours.GRPOTrainer(kit_of(), lambda **_: [], args, train_dataset=[])


@pytest.mark.parametrize("method", [LoRA(rank=2, targets="lm_head"), LoRA(rank=2, targets="all-linear lm_head")])
def test_an_adapter_at_the_head_is_refused_where_its_weight_is_read(method: Any, tmp_path: Path) -> None:
    kit = kit_of(method=method)
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    trainer = trl.SFTTrainer(
        kit, trl.SFTConfig(str(tmp_path), **settings()), train_dataset=rows, processing_class=tokenizer_of(ZOO["llama"])
    )
    with pytest.raises(RouteError, match="acts at the output head lm_head"):
        trainer.train()


@pytest.mark.parametrize("species", ["llama", "gpt2", "t5", "bert"])
def test_a_reference_is_the_base_whatever_is_active(species: str) -> None:
    kit, batch = kit_of(species, LoRA(rank=2)), ZOO[species].batch(2, 0)
    with torch.no_grad():
        for parameter in kit.parameters():
            parameter.normal_()
    ref = kitout.reference(kit)
    with kit.use(None):
        want = run(kit, batch)
    kit.train()
    assert torch.equal(out(ref(**batch)), want)
    if ZOO[species].kind != "encoder":
        hidden = ref.base_model(**batch)[0]
        with kit.use(None):
            assert torch.equal(hidden, kit.base.base_model.eval()(**batch)[0])
        kit.train()
    assert kit.training
    assert kit.base.training
    assert kit.active == "a"
    assert ref.train() is ref
    assert not ref.training
    assert {id(p) for p in ref.parameters()} == {id(p) for p in kit.base.parameters()}
    assert not any(p.requires_grad for p in ref.parameters())
    ref.to(torch.float64)
    assert kit.dtype == next(kit.parameters()).dtype == torch.float64
