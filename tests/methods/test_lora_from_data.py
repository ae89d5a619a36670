"""LoRA with a rank for each module path, and with starts from data: files, merging, PEFT, and what is refused."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

import kitout
from kitout import LoRA
from kitout.errors import ConfigError
from kitout.search import allocate, signals
from kitout.signals.site_signals import Signals
from kitout.train.config.method_field import parse_method
from signals.dense import batches_of, dense_gradients, kit_of, loss
from zoo import ZOO, out

NAME = "llama"
RANKS = {
    "model.layers.0.self_attn.q_proj": 3,
    "model.layers.1.self_attn.q_proj": 1,
    "model.layers.0.mlp.down_proj": 5,
    "model.layers.1.mlp.up_proj": 2,
}


@pytest.fixture(scope="module")
def found() -> Signals:
    return signals(kit_of(NAME), batches_of(NAME), loss, loraga=6)


def logits(kit: object) -> torch.Tensor:
    with torch.no_grad():
        return out(kit(**ZOO[NAME].batch(3, 7)))  # type: ignore[operator]


def moved(kit: kitout.Kit, name: str = "a") -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for value in kit[name].parameters():
            value.add_(0.1 * torch.randn_like(value))


def test_keys_that_are_paths_are_the_targets() -> None:
    kit = kit_of(NAME)
    adapter = kit.add("a", LoRA(rank=RANKS))
    assert {site.path: adapter.delta(site).a.shape[0] for site in adapter.sites} == RANKS
    assert "1 to 5" not in str(kit)  # few ranks are listed
    assert {site.role for site in kit.add("b", LoRA(rank={"self_attn.q_proj": 3, "attn.v": 2})).sites} == {
        "attn.q",
        "attn.v",
    }
    many = {site.path: 1 + i % 3 for i, site in enumerate(kit.sites("all-linear"))}
    kit.add("c", LoRA(rank=many))
    assert f"1 to 3, by {len(many)} paths" in str(kit)
    kit.add("d", LoRA(targets=" ".join(many)))
    assert f"{len(many)} names" in str(kit)
    assert "layers.1.mlp.down_proj" not in str(kit)


def test_the_last_key_that_matches_still_wins() -> None:
    kit = kit_of(NAME)
    first, second = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    for ranks, expected in (
        ({first: 3, "attn.q": 5}, {first: 5, second: 5}),
        ({"attn.q": 5, first: 3}, {first: 3, second: 5}),
        ({"q_proj": 2, "re:.*[.]1[.].*": 4, "layers.0.self_attn.q_proj": 7}, {first: 7, second: 4}),
        ({"*": 2, "q_proj": 4, "self_attn.q_proj": 6, "*q_proj": 1}, {first: 1, second: 1}),
    ):
        method = LoRA(rank=ranks, targets="attn.q")
        assert {site.path: method.rank_at(site) for site in method.sites(kit.survey)} == expected


def test_ranks_by_path_save_load_and_merge(tmp_path: Path) -> None:
    kit = kit_of(NAME)
    kit.add("a", LoRA(rank=RANKS), seed=0)
    moved(kit)
    kit.use("a")
    kit.save("a", tmp_path / "a")
    expected = logits(kit)
    other = kit_of(NAME)
    other.load(tmp_path / "a")
    other.use("a")
    assert torch.equal(logits(other), expected)
    assert other["a"].method == kit["a"].method
    torch.testing.assert_close(logits(other.merged_copy("a")), expected, rtol=1e-4, atol=1e-5)
    assert parse_method({"name": "LoRA", "rank": RANKS}) == LoRA(rank=RANKS)


@pytest.mark.parametrize("init", ["default", "eva", "loraga"])
def test_to_peft_and_back(tmp_path: Path, found: Signals, init: str) -> None:
    kit = kit_of(NAME)
    method = allocate(found, 3000, by="eva", init=init)
    kit.add("a", method, seed=0, start=None if init == "default" else found)
    moved(kit)
    kit.use("a")
    expected = logits(kit)
    kitout.save_peft(kit, "a", tmp_path / "a")
    model = peft.PeftModel.from_pretrained(ZOO[NAME].build(), tmp_path / "a").eval()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    factor = 2 if init == "loraga" else 1  # the start is subtracted as more ranks
    config = model.peft_config["default"]
    assert set(method.rank.values()) <= {r // factor for r in [config.r, *config.rank_pattern.values()]}
    other = kit_of(NAME)
    kitout.load_peft(other, tmp_path / "a", "a")
    other.use("a")
    torch.testing.assert_close(logits(other), expected, rtol=1e-4, atol=1e-5)
    ranks = {site.path: other["a"].delta(site).a.shape[0] for site in other["a"].sites}
    assert ranks == {path: factor * rank for path, rank in method.rank.items()}


def test_many_ranks_of_peft_are_read(tmp_path: Path) -> None:
    """One pattern for each module: plain paths are no regular expressions with a limit."""
    model = ZOO[NAME].build()
    paths = [
        path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear) and ".layers." in path
    ]
    pattern = {path: 1 + i % 4 for i, path in enumerate(paths)}
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=paths, rank_pattern=pattern, init_lora_weights=False)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path / "p")
    kit = kit_of(NAME)
    kitout.load_peft(kit, tmp_path / "p", "a")
    kit.use("a")
    torch.testing.assert_close(logits(kit), logits(theirs), rtol=1e-4, atol=1e-5)
    assert {site.path: kit["a"].delta(site).a.shape[0] for site in kit["a"].sites} == pattern


def test_eva_starts_at_the_input_directions_and_changes_nothing(found: Signals) -> None:
    kit = kit_of(NAME)
    base = logits(kit)
    adapter = kit.add("a", LoRA(rank=4, targets="all-linear", init="eva"), start=found)
    kit.use("a")
    assert torch.equal(logits(kit), base)
    for site in adapter.sites:
        assert torch.equal(adapter.delta(site).a, found[site.path].directions[:4])
        assert not adapter.delta(site).b.any()
    kit.add("b", LoRA(rank=2, init="eva", dora=True), start=found)
    kit.add("c", LoRA(rank={"attn.*": 2, "mlp.*": 3}, targets="all-linear", init="eva", rslora=True), start=found)
    gpt2 = kit_of("gpt2")  # attn.q is a part of a fused projection, and reads what all of it reads
    of_gpt2 = signals(gpt2, batches_of("gpt2"), loss)
    gpt2.add("a", LoRA(rank=2, init="eva"), start=of_gpt2)


def test_loraga_starts_at_the_gradient_and_counts_from_there(found: Signals, tmp_path: Path) -> None:
    """A takes right singular vectors 1 to r and B left ones r + 1 to 2 r, both scaled."""
    kit = kit_of(NAME)
    base = logits(kit)
    adapter = kit.add("a", LoRA(rank=3, targets="all-linear", init="loraga"), start=found)
    kit.use("a")
    torch.testing.assert_close(logits(kit), base, rtol=1e-4, atol=1e-5)
    gradients = dense_gradients(NAME, list(found), batches_of(NAME))
    for site in adapter.sites:
        delta, (left, values, right) = adapter.delta(site), torch.linalg.svd(gradients[site.path], full_matrices=False)
        if values[:6].diff().abs().min() < 1e-2 * values[0]:
            continue  # directions of nearly equal singular values are not unique
        scale = site.d_out**0.25 / 4
        assert ((delta.a / scale) * right[:3]).sum(1).abs().min() > 0.99
        assert ((delta.b.T / scale) * left.T[3:6]).sum(1).abs().min() > 0.99
    moved(kit)
    kit.save("a", tmp_path / "a")
    other = kit_of(NAME)
    other.load(tmp_path / "a")
    other.use("a")
    assert torch.equal(logits(other), logits(kit))
    torch.testing.assert_close(logits(other.merged_copy("a")), logits(kit), rtol=1e-4, atol=1e-4)


def test_what_is_refused(found: Signals) -> None:
    kit = kit_of(NAME)
    for match, method, start in (
        (r"start=kitout.search.signals\(kit, batches, directions=8\)", LoRA(init="eva"), None),
        (r"batches, loraga=8\)", LoRA(init="loraga"), None),
        ("init='default'", LoRA(), found),
        ("IA3 takes none", kitout.IA3(), found),
        ("no input directions of lm_head", LoRA(init="eva", targets="attn.q lm_head"), found),
        ("no gradient of lm_head", LoRA(init="loraga", rank=2, targets="attn.q lm_head"), found),
        (r"signals\(..., loraga=8\)", LoRA(init="loraga", rank=8), found),
        (r"directions=40", LoRA(init="eva", rank=40), found),
        ("at its input", LoRA(init="eva", targets="in:mlp.down"), found),
    ):
        with pytest.raises(ConfigError, match=match):
            kit.add("a", method, start=start)
    assert kit.names == []
    with pytest.raises(ConfigError, match="loraga subtracts"):
        LoRA(dora=True, init="loraga")
