"""Converted adapters do what they did, within the residual that is reported; what loses more is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import kitout
from fuse.parts import add, change, distance, kit_of
from kitout import IA3, FullFineTuning, Kit, LoRA, PrefixTuning, PromptTuning
from kitout.errors import ConfigError, NotMergeable
from zoo import ZOO, out


@pytest.fixture(scope="module")
def kit() -> Kit:
    return kit_of("llama", {"dora": LoRA(rank=2, dora=True), "ia3": IA3(), "lora": LoRA(rank=4, targets="all-linear")})


def test_lora_to_another_rank(kit: Kit) -> None:
    same = kitout.convert(kit, "lora", "same", to=LoRA(rank=6))
    assert same.residual.total <= 1e-9
    assert distance(change(kit, {"same": 1}), change(kit, {"lora": 1})) <= 1e-9
    assert same.adapter.method.targets == "all-linear"
    less = kitout.convert(kit, "lora", "less", to=LoRA(rank=3, alpha=5), max_residual=0.9)
    assert abs(less.residual.total - distance(change(kit, {"less": 1}), change(kit, {"lora": 1}))) <= 1e-5
    for name in ("same", "less"):
        kit.remove(name)


@pytest.mark.parametrize("source", ["dora", "ia3"])
def test_too_much_is_refused_with_the_rank_that_would_do(kit: Kit, source: str) -> None:
    with pytest.raises(ConfigError, match=r"loses .* of its change .*LoRA\(rank=(\d+)\) would do") as error:
        kitout.convert(kit, source, "new", to=LoRA(rank=2))
    assert "new" not in kit
    rank = int(str(error.value).split("LoRA(rank=")[-1].split(")")[0])
    assert kitout.convert(kit, source, "new", to=LoRA(rank=rank)).residual.total <= 0.1
    kit.remove("new")
    with pytest.raises(ConfigError, match="would do"):
        kitout.convert(kit, source, "new", to=LoRA(rank=rank - 1))


def test_to_trained_copies(kit: Kit) -> None:
    fused = kitout.convert(kit, "ia3", "copies", to="dense")
    assert type(fused.adapter.method) is FullFineTuning
    assert distance(change(kit, {"copies": 1}), change(kit, {"ia3": 1})) <= 1e-9
    kit.remove("copies")


def test_what_no_rank_holds_counts(kit: Kit) -> None:
    add(kit, "full", FullFineTuning(targets="attn.q norm"))
    with pytest.raises(ConfigError, match=r"gains and shifts of norms: .*input_layernorm.weight"):
        kitout.convert(kit, "full", "new", to=LoRA(rank=48))
    with pytest.raises(ConfigError, match="no rank would do"):
        kitout.convert(kit, "full", "new", to=LoRA(rank=48), drop="norms", max_residual=0.01)
    fused = kitout.convert(kit, "full", "new", to=LoRA(rank=48), drop="norms", max_residual=1.0)
    assert set(fused.dropped.values()) == {"norms"}
    assert fused.residual.by_role["norm"] == 1.0
    assert fused.residual.by_role["attn.q"] <= 1e-6
    for name in ("full", "new"):
        kit.remove(name)


@pytest.mark.parametrize("species", ["llama", "gpt2", "qwen3"])
def test_a_prompt_becomes_a_prefix(species: str) -> None:
    kit = kit_of(species, {"prompt": PromptTuning(length=3)}, torch.float32)
    fused = kitout.convert(kit, "prompt", "prefix", to=PrefixTuning())
    assert fused.adapter.method.length == 3
    batch = ZOO[species].batch(2, 0)
    logits, texts = [], []
    for name in ("prompt", "prefix"):
        with torch.no_grad(), kit.use(name):
            logits.append(out(kit(**batch)))
            texts.append(kit.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False))
    assert (logits[0] - logits[1]).abs().max() <= 1e-5
    assert torch.equal(texts[0], texts[1])


def test_a_prompt_that_depends_on_the_text_is_refused() -> None:
    kit = kit_of("llama", {"after": PromptTuning(length=3, place="after"), "lora": LoRA()})
    with pytest.raises(ConfigError, match="after the first token"):
        kitout.convert(kit, "after", "new", to=PrefixTuning())
    with pytest.raises(ConfigError, match="only a prompt converts"):
        kitout.convert(kit, "lora", "new", to=PrefixTuning())
    with pytest.raises(ConfigError, match=r"it converts to=PrefixTuning\(\)"):
        kitout.convert(kit, "after", "new", to=LoRA())
    add(kit, "before", PromptTuning(length=3))
    with pytest.raises(ConfigError, match="has 3 tokens"):
        kitout.convert(kit, "before", "new", to=PrefixTuning(length=5))
    encoder = kit_of("bert", {"prompt": PromptTuning(length=3)})
    with pytest.raises(ConfigError, match="bidirectional"):
        kitout.convert(encoder, "prompt", "new", to=PrefixTuning())


def test_an_adapter_out_of_a_checkpoint() -> None:
    kit = kit_of("llama", {"lora": LoRA(rank=3, targets="all-linear")}, torch.float32)
    tuned = kit.merged_copy("lora")
    fused = kitout.extract(kit, tuned, "found", rank=3)
    assert fused.residual.total <= 1e-4
    assert not fused.dropped
    assert distance(change(kit, {"found": 1}), change(kit, {"lora": 1})) <= 1e-4
    batch = ZOO["llama"].batch(2, 0)
    with torch.no_grad(), kit.use("found"):
        assert (out(kit(**batch)) - out(tuned(**batch))).abs().max() <= 1e-3


def test_a_checkpoint_in_a_folder(tmp_path: Path) -> None:
    kit = kit_of("llama-tied", {"lora": LoRA(rank=2), "table": LoRA(rank=2, targets="embed attn.q")}, torch.float32)
    kit.merged_copy("lora").save_pretrained(tmp_path / "lora")
    assert kitout.extract(kit, tmp_path / "lora", "found", rank=2).residual.total <= 1e-4
    untied = kit.merged_copy("table")
    fused = kitout.extract(kit, untied, "part", rank=2)
    assert list(fused.dropped) == ["model.embed_tokens.weight"]
    whole = kitout.extract(kit, untied, "whole", rank=2, targets="attn.q embed")
    assert whole.residual.total <= 1e-4
    with pytest.raises(ConfigError, match="does not load"):
        kitout.extract(kit, tmp_path / "nowhere", "new")


def test_what_differs_outside_the_targets_counts() -> None:
    kit = kit_of("bert", {"full": FullFineTuning()})
    tuned = kit.merged_copy("full")
    fused = kitout.extract(kit, dict(tuned.named_parameters()), "found", energy=0.9, targets="attn.q")
    assert abs(fused.residual.total - distance(change(kit, {"found": 1}), change(kit, {"full": 1}))) <= 1e-5
    assert {"biases", "norms", "matrices"} <= set(fused.dropped.values())
    assert fused.residual.by_site[kit["found"].sites[0].path] < 1


def test_what_is_no_fine_tuned_copy_is_refused() -> None:
    kit = kit_of("llama", {})
    with pytest.raises(ConfigError, match="nothing to extract"):
        kitout.extract(kit, kit.base, "new", rank=2)
    with pytest.raises(ConfigError, match=r"it has no model\.layers.0"):
        kitout.extract(kit, nn.Linear(2, 2), "new", rank=2)
    with pytest.raises(ConfigError, match="not both"):
        kitout.extract(kit, kit.base, "new", rank=2, energy=0.9)


def test_what_does_not_fold_is_refused(kit: Kit) -> None:
    kit.add("prefix", PrefixTuning(length=2))
    with pytest.raises(NotMergeable, match="how='parameters'"):
        kitout.combine(kit, "new", {"prefix": 1.0, "lora": 1.0})
    kit.remove("prefix")


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda kit: kitout.combine(kit, "new", {}), "combine takes adapters"),
        (lambda kit: kitout.combine(kit, "new", {"loar": 1.0}), "did you mean 'lora'"),
        (lambda kit: kitout.combine(kit, "new", {"lora": float("nan")}), "finite"),
        (lambda kit: kitout.combine(kit, "lora", {"lora": 1.0}), "exists"),
        (lambda kit: kitout.combine(kit, "new", {"lora": 1.0}, how="tie"), "did you mean 'ties'"),
        (lambda kit: kitout.combine(kit, "new", {"lora": 1.0}, to="lora"), "write 'exact'"),
        (lambda kit: kitout.combine(kit, "new", {"lora": 1.0}, to=LoRA(dora=True)), "plain LoRA"),
        (lambda kit: kitout.combine(kit, "new", {"lora": 1.0}, drop="bias"), "biases"),
        (lambda kit: kitout.combine(kit, "new", {"lora": 1.0}, how="parameters"), "how='mean'"),
        (lambda kit: kitout.combine(kit, "new", {"lora": 1.0}, to=LoRA(rank=2, targets="attn.q")), "down_proj.weight"),
        (lambda kit: kit.add("new", LoRA(energy=0.9)), "takes rank="),
        (lambda kit: LoRA(rank=4, energy=0.9), "rank or energy"),
        (lambda kit: kitout.convert(kit, "lora", "new", to="exact"), "write LoRA"),
        (lambda kit: kitout.convert(kit, "lora", "new", to=LoRA(), max_residual=2), "from 0 to 1"),
    ],
)
def test_refusals_say_what_to_write(kit: Kit, call: object, match: str) -> None:
    with pytest.raises((ConfigError, ValueError, KeyError), match=match):
        call(kit)  # type: ignore[operator]
    assert "new" not in kit
