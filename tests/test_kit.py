"""The kit as a module: parameters and state are the adapters' alone, everything else is the base's.

transformers.Trainer, accelerate and torch's own tools hold the kit, so modes, dtypes, signatures and checkpointing have
to go through it, and training with any of them must change an adapter and nothing else.
"""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import kitout
from kitout import IA3, Kit, LoRA
from laws.activate import assert_same, kit_with, put_on, run
from zoo import ZOO, out


@pytest.fixture
def kit(tiny_llama: nn.Module) -> Kit:
    kit = kitout.attach(tiny_llama)
    put_on(kit, LoRA(rank=2), "a", seed=1)
    put_on(kit, IA3(), "b.c-d", seed=2)
    return kit


def test_parameters_and_state_are_the_adapters_alone(kit: Kit) -> None:
    own = {id(p) for name in kit.names for p in kit[name].parameters()}
    assert {id(p) for p in kit.parameters()} == own
    assert not {id(p) for p in kit.base.parameters()} & own
    assert sum(v.numel() for v in kit.state_dict().values()) == sum(kit.num_parameters(n).total for n in kit.names)
    assert not any(m is kit.base for m in kit.modules())


def test_state_travels_to_another_kit(kit: Kit, tiny_llama: nn.Module) -> None:
    batch = ZOO["llama"].batch(2, 0)
    other = kitout.attach(ZOO["llama"].build())
    other.add("a", LoRA(rank=2))
    other.add("b.c-d", IA3())
    other.load_state_dict(kit.state_dict())
    for name in kit.names:
        with kit.use(name), other.use(name):
            assert torch.equal(run(kit, batch), run(other, batch))


def test_the_call_is_the_bases(kit: Kit) -> None:
    batch = ZOO["llama"].batch(2, 0)
    assert inspect.signature(kit.forward) == inspect.signature(type(kit.base).forward.__get__(kit.base))
    with kit.use("a"), torch.no_grad():
        a, b = kit(**batch), kit.base(**batch)
        assert type(a) is type(b)
        assert torch.equal(a.logits, b.logits)
        labelled = kit(**batch, labels=batch["input_ids"])
        assert labelled.loss.isfinite()
        assert torch.equal(kit(batch["input_ids"], batch["attention_mask"]).logits, a.logits)


def test_what_is_asked_of_the_base(kit: Kit) -> None:
    assert kit.config is kit.base.config
    assert kit.device == kit.base.device
    assert kit.dtype == kit.base.dtype == torch.float32
    assert kit.can_generate()
    ids = ZOO["llama"].batch(1, 0)["input_ids"]
    with kit.use("a"):
        assert torch.equal(
            kit.generate(ids, max_new_tokens=3, do_sample=False),
            kit.base.generate(ids, max_new_tokens=3, do_sample=False),
        )


def test_a_model_that_cannot_generate_says_so() -> None:
    kit = kitout.attach(ZOO["timm-vit"].build())
    for ask in (lambda: kit.generate(), lambda: kit.config, lambda: kit.gradient_checkpointing_enable()):
        with pytest.raises(AttributeError):
            ask()


def test_modes_reach_base_and_adapters(kit: Kit) -> None:
    assert kit.train() is kit
    assert kit.training
    assert all(m.training for m in (*kit.base.modules(), *kit.modules()))
    assert kit.eval() is kit
    assert not any(m.training for m in (*kit.base.modules(), *kit.modules()))
    kit.train()
    assert kit.add("late", LoRA()).training


def test_dtypes_reach_base_and_adapters(kit: Kit) -> None:
    kit.to(torch.float64)
    assert {p.dtype for p in (*kit.base.parameters(), *kit.parameters())} == {torch.float64}
    kit.half().float()
    assert {p.dtype for p in (*kit.base.parameters(), *kit.parameters())} == {torch.float32}


def test_train_only_freezes_the_rest(kit: Kit) -> None:
    kit.train_only("b.c-d")
    assert {n for n in kit.names if all(p.requires_grad for p in kit[n].parameters())} == {"b.c-d"}
    assert not any(p.requires_grad for p in kit["a"].parameters())
    kit.train_only("a", "b.c-d")
    assert all(p.requires_grad for p in kit.parameters())
    with pytest.raises(kitout.errors.UnknownAdapter):
        kit.train_only("a", "nobody")
    assert all(p.requires_grad for p in kit.parameters()), "a wrong name changes nothing"


def test_checkpointing_goes_through_under_both_names(kit: Kit) -> None:
    layers = [m for m in kit.base.modules() if hasattr(type(m), "gradient_checkpointing")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for on, off in (
            (kit.gradient_checkpointing_enable, kit.gradient_checkpointing_disable),
            (kit.activation_checkpointing_enable, kit.activation_checkpointing_disable),
        ):
            on()
            assert all(m.gradient_checkpointing for m in layers)
            off()
            assert not any(m.gradient_checkpointing for m in layers)
        kit.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        kit.gradient_checkpointing_disable()


def test_the_table_shows_roles_and_adapters(kit: Kit) -> None:
    text = str(kit)
    for text_part in (
        "attn.q",
        "0-1",
        "48 -> 24",
        "LoRA(rank=2)",
        "b.c-d",
        "%",
        f"{kit.num_parameters('a').trainable:,}",
    ):
        assert text_part in text
    kit.merge("a")
    assert "merged" in str(kit)


def test_seeds_make_adapters_repeatable_and_leave_the_global_generators_alone(kit: Kit, gpu_seeds: list[int]) -> None:
    state = torch.random.get_rng_state()
    one, two, other = (kit.add(n, LoRA(rank=4), seed=s) for n, s in (("s1", 7), ("s2", 7), ("s3", 8)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not gpu_seeds
    pairs = list(zip(one.parameters(), two.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q, _ in pairs)
    assert not all(torch.equal(p, r) for p, _, r in pairs)


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.ids = ZOO["llama"].batch(8, 3)["input_ids"]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i], "extra": torch.tensor(0)}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_trainer_trains_a_kit(kit: Kit, tmp_path: Path, checkpointing: bool) -> None:
    """Unused columns go by the kit's signature; the loss falls; the adapter alone changes."""
    pytest.importorskip("accelerate")
    base = {k: v.clone() for k, v in kit.base.state_dict().items()}
    start = {n: [p.detach().clone() for p in kit[n].parameters()] for n in kit.names}
    kit.train_only("a")
    kit.use("a")
    recompute = {"activation_checkpointing": True} if checkpointing else {}
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **recompute,
    )
    trainer = transformers.Trainer(model=kit, args=settings, train_dataset=Rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, base[k]) for k, v in kit.base.state_dict().items())
    assert all(not torch.equal(p, q) for p, q in zip(kit["a"].parameters(), start["a"], strict=True))
    assert all(torch.equal(p, q) for p, q in zip(kit["b.c-d"].parameters(), start["b.c-d"], strict=True))


def test_training_a_stack_and_rows_reaches_each(kit: Kit) -> None:
    batch = ZOO["llama"].batch(2, 0)
    with kit.use(["a", "b.c-d"]):
        out(kit(**batch)).square().mean().backward()
    assert all(p.grad is not None for p in kit.parameters())
    kit.zero_grad()
    assert all(p.grad is None for p in kit.parameters())


def test_detach_gives_back_a_plain_model(kit: Kit) -> None:
    batch = ZOO["llama"].batch(2, 0)
    with kit.use(None):
        base = run(kit, batch)
    kit.use("a")
    model = kit.detach()
    assert_same(run(model, batch), base, 0.0)
    again = kitout.attach(model)
    put_on(again, LoRA(rank=2), "a", seed=1)
    again.use("a")
    assert not torch.equal(run(model, batch), base)


def test_the_models_own_mode_reaches_the_adapters() -> None:
    kit, batch = kit_with("llama", a=LoRA(dropout=0.5))
    kit.use("a")
    kit.base.train()
    assert kit.training
    assert kit["a"].training
    assert not torch.equal(run(kit, batch), run(kit, batch))
    kit.base.eval()
    assert not kit["a"].training
    assert torch.equal(run(kit, batch), run(kit, batch))
