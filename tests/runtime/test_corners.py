"""Corners that once were wrong in silence: each is now done right or refused by name."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import kitout
from kitout import IA3, FullFineTuning, Kit, LoRA, Mix, Stack
from kitout.errors import (
    ConfigError,
    KitDetached,
    MergeStateError,
    NotMergeable,
    RouteError,
    TargetError,
)
from zoo import ZOO, out


def worn(name: str, **methods: kitout.Method) -> tuple[Kit, dict[str, torch.Tensor]]:
    kit = kitout.attach(ZOO[name].build())
    for i, (key, method) in enumerate(methods.items()):
        kit.add(key, method, seed=i)
        randomise(kit[key], i)
    return kit, ZOO[name].batch(2, 0)


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.add_(0.2 * torch.randn(p.shape, generator=generator))


def logits(kit: Kit, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return out(kit.base(**batch))


def test_a_with_route_never_reaches_a_thread_outside_of_it() -> None:
    kit, batch = worn("llama", a=LoRA(), b=LoRA())
    base = logits(kit, batch)
    stop = threading.Event()

    def loop(name: str) -> None:
        while not stop.is_set():
            with kit.use(name):
                logits(kit, batch)

    threads = [threading.Thread(target=loop, args=(n,)) for n in ("a", "b", "a")]
    for thread in threads:
        thread.start()
    try:
        wrong = sum(not torch.equal(logits(kit, batch), base) for _ in range(60))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == 0


def test_a_dropped_choice_holds_for_every_thread() -> None:
    kit, batch = worn("llama", a=LoRA())
    kit.use("a")
    mine = logits(kit, batch)
    theirs: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: theirs.append(logits(kit, batch)))
    thread.start()
    thread.join()
    assert torch.equal(theirs[0], mine)


def test_merged_while_merged_is_refused() -> None:
    kit, _ = worn("llama", a=LoRA(), b=LoRA())
    kit.merge("a")
    for name in ("a", "b"):
        with pytest.raises(MergeStateError, match="unmerge"):
            kit.merged_copy(name)
    with pytest.raises(MergeStateError):
        kit.strength("a", 0.5)
    with pytest.raises(MergeStateError):
        kit.to(torch.float64)


def test_training_while_merged_says_so() -> None:
    kit, batch = worn("llama", a=LoRA())
    kit.merge("a")
    kit.train()
    with pytest.raises(MergeStateError, match="reach no adapter"):
        kit(**batch)
    kit.eval()
    kit(**batch)


def test_gathered_rows_follow_replaced_values() -> None:
    kit, batch = worn("llama", a=LoRA(), b=LoRA())
    kit.eval()
    route = ["a", "b"]
    with kit.use(route):
        logits(kit, batch)
    new = {k: torch.randn_like(v) for k, v in kit.state_dict().items()}
    kit.load_state_dict(new, assign=True)
    with kit.use(route):
        rows = logits(kit, batch)
    with kit.use("a"):
        alone = logits(kit, {k: v[:1] for k, v in batch.items()})
    assert torch.allclose(rows[:1], alone, atol=1e-4 * alone.abs().max().item())


def test_rows_seen_first_under_inference_mode_can_be_trained() -> None:
    kit, batch = worn("llama", a=LoRA(), i=IA3())
    with kit.use(["a", "i"]):
        with torch.inference_mode():
            kit.base(**batch)
        out(kit(**batch)).sum().backward()
    assert all(p.grad is not None for p in kit["i"].parameters())


def test_the_model_s_own_mode_reaches_the_adapters() -> None:
    kit, batch = worn("llama", a=LoRA(dropout=0.5))
    kit.use("a")
    kit.base.train()
    assert kit.training
    assert kit["a"].training
    assert not torch.equal(logits(kit, batch), logits(kit, batch))
    kit.base.eval()
    assert not kit["a"].training
    assert torch.equal(logits(kit, batch), logits(kit, batch))


def test_heads_blend_only_with_their_like() -> None:
    kit, batch = worn("bert", a=LoRA())
    kit.add("v", LoRA(rank=2), heads={"classifier": nn.Linear(kit.survey.towers[0].width, 1)})
    with kit.use("v"):
        assert logits(kit, batch).shape[-1] == 1
    for route, strength in (("v", 0.5), (Mix({"v": 0.5}), 1.0)):
        kit.strength("v", strength)
        with kit.use(route), pytest.raises(RouteError, match="another width"):
            logits(kit, batch)
    kit.strength("v", 0.5)
    with pytest.raises(NotMergeable, match="strength"):
        kit.merge("v")


def test_a_head_hides_what_lies_inside_it() -> None:
    kit = kitout.attach(ZOO["roberta"].build())
    width = kit.survey.towers[0].width

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(width, 5)

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return self.out(features[:, 0])

    kit.add("a", LoRA(rank=2), heads={"classifier": First()})
    kit.add("b", LoRA(rank=2, targets="classifier.dense"))
    before = {k: v.clone() for k, v in kit.base.state_dict().items()}
    with pytest.raises(RouteError, match="inside classifier"):
        kit.use(Stack("a", "b"))
    with pytest.raises(NotMergeable, match="inside classifier"):
        kit.merge("a", "b")
    assert not kit.merged
    assert all(torch.equal(v, before[k]) for k, v in kit.base.state_dict().items())


def test_both_ends_of_one_module_at_half_strength_merge() -> None:
    kit, batch = worn("llama", i=IA3(targets="mlp.down in:mlp.down"))
    kit.strength("i", 0.5)
    with kit.use("i"):
        attached = logits(kit, batch)
    kit.merge("i")
    assert torch.allclose(logits(kit, batch), attached, atol=1e-5)


def test_one_input_is_one_place() -> None:
    kit, batch = worn("gpt2", i=IA3(targets="in:attn.q in:attn.k"))
    assert len(kit["i"].sites) == len(kit["i"].deltas) == 2
    assert kit.num_parameters("i").trainable == sum(s.d_out for s in kit["i"].sites)
    logits(kit, batch)


def test_lora_where_it_cannot_be() -> None:
    kit = kitout.attach(ZOO["llama"].build())
    with pytest.raises(ConfigError, match="taken at its input"):
        kit.add("a", LoRA(dora=True, targets="in:attn.o"))
    with pytest.raises(TargetError, match="changes a projection"):
        kit.add("b", LoRA(targets="sub.mlp"))
    assert kit.names == []


def test_recomputation_at_the_strength_of_its_forward() -> None:
    def grads(after: float | None) -> list[torch.Tensor]:
        kit, batch = worn("llama", i=IA3())
        kit.train()
        kit.gradient_checkpointing_enable()
        kit.strength("i", 0.7)
        kit.use("i")
        loss = out(kit(**batch, use_cache=False)).square().mean()
        if after is not None:
            kit.strength("i", after)
        loss.backward()
        return [p.grad for p in kit["i"].parameters() if p.grad is not None]

    for a, b in zip(grads(None), grads(0.1), strict=True):
        assert torch.equal(a, b)


def test_rows_outside_of_a_call_are_not_guessed() -> None:
    kit, batch = worn("t5", a=LoRA(), b=LoRA())
    ids = batch["input_ids"]
    with kit.use(["a", "b"]):
        kit.base.get_encoder()(ids)
        with pytest.raises(RouteError, match="4 rows"):
            kit.base.get_encoder()(torch.cat((ids, ids)))


def test_a_spent_kit_says_so() -> None:
    kit, _ = worn("llama", a=LoRA())
    kit.use("a")
    kit.detach()
    for action in (lambda: kit.use("a"), lambda: kit.add("b", LoRA()), lambda: kit.merge("a")):
        with pytest.raises(KitDetached):
            action()


def test_remove_waits_for_every_with() -> None:
    kit, _ = worn("llama", a=LoRA(), b=LoRA())
    with kit.use("a"), kit.use("b"), pytest.raises(RouteError, match="active"):
        kit.remove("a")
    kit.remove("a")
    handle = kit.use("b")
    with handle, handle:
        assert kit.active == "b"


def test_full_fine_tuning_keeps_no_call() -> None:
    kit, batch = worn("llama", f=FullFineTuning())
    with kit.use("f"):
        out(kit(**batch)).sum().backward()
    assert torch.equal(logits(copy.deepcopy(kit), batch), logits(kit, batch))


def test_another_model_of_the_swapped_class() -> None:
    kit, batch = worn("llama", a=LoRA())
    other = type(kit.base)(kit.config).eval()
    assert torch.isfinite(out(other(**batch))).all()


def test_heads_from_the_model_itself() -> None:
    kit, batch = worn("bert", a=LoRA())
    with pytest.raises(TargetError, match="give a copy"):
        kit.add("b", LoRA(), heads={"classifier": kit.base.classifier})
    with pytest.raises(TargetError, match="needs an nn"):
        kit.add("b", LoRA(), heads={"classifier": 3})  # type: ignore[dict-item]
    kit.add("first", LoRA(), heads={"classifier": copy.deepcopy(kit.base.classifier)})
    kit.add("b", LoRA(), heads={"classifier": copy.deepcopy(kit.base.classifier)})
    assert all(p.requires_grad for p in kit["b"].parameters())
    kit.use("b")
    out(kit(**batch)).sum().backward()


def test_more_bad_input() -> None:
    kit, _ = worn("llama", a=LoRA())
    with pytest.raises(RouteError, match="Mix"):
        Mix(["a"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="seed"):
        kit.add("b", LoRA(), seed="x")  # type: ignore[arg-type]
