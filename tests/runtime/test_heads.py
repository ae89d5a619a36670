"""Heads: modules replaced while an adapter is active; trained, counted, switched, routed and merged with it.

A head is an ordinary module of the user's. The model's own module stays where it is and comes back untouched.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kitout
from kitout import Kit, LoRA, Mix, PartialFineTuning, Stack
from kitout.errors import NotMergeable, RouteError, TargetError
from laws.activate import assert_same, kit_with, put_on, run, untrivial
from zoo import ZOO, out, rows_of

BERT = ZOO["bert"]
D, LABELS = BERT.width, 3


@pytest.fixture
def kit() -> Kit:
    kit = kitout.attach(BERT.build())
    for seed, name in enumerate(("mood", "topic")):
        torch.manual_seed(seed)
        kit.add(name, LoRA(rank=2), seed=seed, heads={"classifier": nn.Linear(D, LABELS)})
        untrivial(kit[name], seed)
    put_on(kit, LoRA(rank=2), "plain", seed=5)
    return kit


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return BERT.batch(3, 0)


def by_hand(kit: Kit, name: str, batch: dict[str, Tensor]) -> Tensor:
    """The head on the pooled output under the adapter."""
    with kit.use(name), torch.no_grad():
        pooled = kit.base.bert(**batch).pooler_output
        return kit[name].heads["classifier"].module(pooled)


def test_a_head_replaces_while_it_is_active(kit: Kit, batch: dict[str, Tensor]) -> None:
    base, own = run(kit, batch), kit.base.classifier
    with kit.use("mood"):
        mood = run(kit, batch)
    assert mood.shape == (3, LABELS)
    assert_same(mood, by_hand(kit, "mood", batch), 1e-6)
    with kit.use("topic"):
        assert not torch.equal(run(kit, batch), mood)
    assert torch.equal(run(kit, batch), base)
    assert kit.base.classifier is own
    assert "classifier.weight" in kit.base.state_dict()


def test_a_head_is_the_users_own_module(kit: Kit, batch: dict[str, Tensor]) -> None:
    head = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, LABELS))
    adapter = kit.add("deep", LoRA(rank=2), heads={"classifier": head})
    assert adapter.heads["classifier"].module is head
    with kit.use("deep"):
        run(kit, batch)
        kit(**batch).logits.sum().backward()
    assert all(p.grad is not None for p in head.parameters())
    assert all(p.grad is None for p in kit.base.classifier.parameters())


def test_a_head_is_counted_and_trained(kit: Kit, batch: dict[str, Tensor]) -> None:
    cost = kit.num_parameters("mood")
    assert cost.heads == D * LABELS + LABELS
    assert cost.total == cost.formula + cost.heads == cost.trainable
    before = copy.deepcopy(kit["mood"].state_dict())
    with kit.use("mood"):
        optimiser = torch.optim.SGD(kit["mood"].parameters(), lr=0.1)
        nn.functional.cross_entropy(kit(**batch).logits, torch.tensor([0, 1, 2])).backward()
        optimiser.step()
    assert all(not torch.equal(v, before[k]) for k, v in kit["mood"].state_dict().items())
    kit.train_only("topic")
    assert kit.num_parameters("mood").trainable == 0


def test_rows_have_their_own_heads(kit: Kit, batch: dict[str, Tensor]) -> None:
    rows = ["topic", "mood", "topic"]
    with kit.use(rows):
        together = run(kit, batch)
    for i, name in enumerate(rows):
        with kit.use(name):
            assert_same(together[i : i + 1], run(kit, rows_of(batch, i)))


def test_heads_of_different_width_cannot_share_a_batch(kit: Kit, batch: dict[str, Tensor]) -> None:
    with kit.use(["mood", None, "topic"]), pytest.raises(RouteError, match=r"(?s)classifier.*widths?|shapes"):
        kit(**batch)
    run(kit, batch)


def test_a_stack_uses_the_last_head(kit: Kit, batch: dict[str, Tensor]) -> None:
    with kit.use(Stack("topic", "plain", "mood")), torch.no_grad():
        pooled = kit.base.bert(**batch).pooler_output
        assert_same(run(kit, batch), kit["mood"].heads["classifier"].module(pooled), 1e-6)


def test_merging_takes_the_head_along(kit: Kit, batch: dict[str, Tensor]) -> None:
    base, own = run(kit, batch), kit.base.classifier
    with kit.use("mood"):
        want = run(kit, batch)
    kit.merge("mood")
    assert_same(run(kit, batch), want)
    assert not any(p.requires_grad for p in kit.base.parameters())
    kit.unmerge()
    assert kit.base.classifier is own
    assert torch.equal(run(kit, batch), base)
    plain = kit.merged_copy("mood", check_saveable=False)
    assert_same(run(plain, batch), want)
    with torch.no_grad():
        plain.classifier.weight.zero_()
    assert kit["mood"].heads["classifier"].module.weight.any(), "the copy has a head of its own"


def test_a_head_follows_mode_dtype_and_strength(kit: Kit, batch: dict[str, Tensor]) -> None:
    kit.train()
    assert kit["mood"].heads["classifier"].module.training
    kit.eval().to(torch.float64)
    with kit.use("mood"):
        assert run(kit, batch).dtype == torch.float64


def test_a_head_over_a_half_base_gives_the_bases_dtype(batch: dict[str, Tensor]) -> None:
    kit = kitout.attach(BERT.build().to(torch.bfloat16))
    kit.add("mood", LoRA(rank=2), heads={"classifier": nn.Linear(D, LABELS)})
    with kit.use("mood"):
        assert run(kit, batch).dtype == torch.bfloat16


@pytest.mark.parametrize("path", ["classifer", "", "bert.nothing"])
def test_a_head_needs_a_module_to_replace(kit: Kit, path: str) -> None:
    names = list(kit.names)
    with pytest.raises(TargetError, match="heads"):
        kit.add("new", LoRA(rank=2), heads={path: nn.Linear(D, LABELS)})
    assert kit.names == names


def test_sites_under_a_head_are_left_out(kit: Kit) -> None:
    adapter = kit.add("new", LoRA(rank=2, targets="head attn.q"), heads={"classifier": nn.Linear(D, LABELS)})
    assert not any(s.path == "classifier" for s in adapter.sites)


def test_an_adapter_may_be_a_head_alone_and_keeps_its_running_statistics(tmp_path: Path) -> None:
    """The linear probe of the vision papers: nothing of the model is trained, and the norm has no gain."""
    specimen = ZOO["vit"]
    kit, batch = kitout.attach(specimen.build()), specimen.batch(4, 0)
    head = nn.Sequential(nn.BatchNorm1d(specimen.width, affine=False, eps=1e-6), nn.Linear(specimen.width, LABELS))
    kit.add("probe", PartialFineTuning(part="head"), heads={"classifier": head})
    assert sum(p.numel() for p in kit["probe"].parameters()) == specimen.width * LABELS + LABELS
    kit.use("probe")
    kit.train()
    kit(**batch)
    kit.eval()
    want = run(kit, batch)
    kit.save("probe", tmp_path / "probe")
    loaded = kit.load(tmp_path / "probe", name="again")
    assert loaded.heads["classifier"].module[0].num_batches_tracked == 1
    with kit.use("again"):
        assert torch.equal(run(kit, batch), want)


def test_heads_blend_only_with_their_like() -> None:
    kit, batch = kit_with("bert", a=LoRA())
    kit.add("v", LoRA(rank=2), heads={"classifier": nn.Linear(kit.survey.towers[0].width, 1)})
    with kit.use("v"):
        assert run(kit, batch).shape[-1] == 1
    for route, strength in (("v", 0.5), (Mix({"v": 0.5}), 1.0)):
        kit.strength("v", strength)
        with kit.use(route), pytest.raises(RouteError, match="another width"):
            run(kit, batch)
    kit.strength("v", 0.5)
    with pytest.raises(NotMergeable, match="strength"):
        kit.merge("v")


def test_an_adapter_inside_another_ones_head_is_refused() -> None:
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


def test_heads_from_the_model_itself() -> None:
    kit, batch = kit_with("bert", a=LoRA())
    with pytest.raises(TargetError, match="give a copy"):
        kit.add("b", LoRA(), heads={"classifier": kit.base.classifier})
    with pytest.raises(TargetError, match="needs an nn"):
        kit.add("b", LoRA(), heads={"classifier": 3})  # type: ignore[dict-item]
    kit.add("first", LoRA(), heads={"classifier": copy.deepcopy(kit.base.classifier)})
    kit.add("b", LoRA(), heads={"classifier": copy.deepcopy(kit.base.classifier)})
    assert all(p.requires_grad for p in kit["b"].parameters())
    kit.use("b")
    out(kit(**batch)).sum().backward()
