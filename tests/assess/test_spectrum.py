"""Intruder dimensions equal those of the definition, of every adapter that has a form in weights."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import kitout
from kitout import IA3, LoRA, Mix, PromptTuning, Stack
from kitout.assess import run, spectrum
from kitout.assess.spectrum import count_intruders, measure_spectrum
from kitout.errors import ConfigError
from tiny_models import tokenizer
from zoo import ZOO


def counted(w: Tensor, new: Tensor) -> int:
    """By the definition, vector by vector."""
    before, after = torch.linalg.svd(w)[0], torch.linalg.svd(new)[0]
    return sum(
        max(abs(float(after[:, j] @ before[:, i])) for i in range(min(w.shape))) < 0.5 for j in range(min(10, *w.shape))
    )


def far(kit: Any, alpha: float = 1.0) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in kit.parameters():
            value.add_(alpha * torch.randn(value.shape, generator=generator, dtype=value.dtype))
    return kit


@pytest.mark.parametrize("species", ["llama", "gpt2"])  # whose weights are stored the other way round
def test_every_changed_matrix_is_counted_by_the_definition(species: str) -> None:
    kit = kitout.attach(ZOO[species].build().double())
    kit.add("lora", LoRA(rank=2, targets="all-linear"), seed=0, dtype=torch.float64)
    kit.add("ia3", IA3(), seed=1, dtype=torch.float64)
    kit.add("dora", LoRA(rank=2, dora=True), seed=2, dtype=torch.float64)
    far(kit)
    routes = {"lora": "lora", "ia3": "ia3", "dora": "dora", "both": Stack("lora", "dora"), "mix": Mix({"lora": 0.5})}
    found = measure_spectrum(kit, routes)  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in kit.base.state_dict().items()}
    for name, route in routes.items():
        after = kit.merged_copy(route).state_dict()
        for weight, number in found[name].matrices.items():
            w, new = (each[weight].T if species == "gpt2" else each[weight] for each in (before, after))
            assert number == counted(w, new), (name, weight)
        changed = {key for key, value in after.items() if value.ndim == 2 and not torch.equal(value, before[key])}
        assert set(found[name].matrices) == changed, name
        assert found[name].total == sum(total for _, total in found[name].by_role.values())
    assert found["lora"].total > 0


def test_wide_matrices_give_the_same_number(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    cases = []
    for rows, columns, strength in ((60, 90, 3.0), (90, 60, 0.3), (64, 64, 30.0), (40, 200, 0.0)):
        u, _, v = torch.linalg.svd(torch.randn(rows, columns, generator=generator), full_matrices=False)
        w = u * torch.logspace(1, -1, min(rows, columns)) @ v
        factors = torch.randn(rows, 3, generator=generator), torch.randn(3, columns, generator=generator)
        cases.append((w, strength / 60 * factors[0] @ factors[1]))
    exact = [count_intruders(w, change) for w, change in cases]
    assert exact == [counted(w, w + change) if change.any() else 0 for w, change in cases]
    assert len(set(exact)) > 1
    monkeypatch.setattr(spectrum, "EXACT_SIZE", 0)
    state = torch.random.get_rng_state()
    for known in (4, 12, 128):
        monkeypatch.setattr(spectrum, "KNOWN", known)
        assert [count_intruders(w, change) for w, change in cases] == exact
    assert torch.equal(state, torch.random.get_rng_state())


def test_it_is_shown_and_an_adapter_without_a_form_in_weights_says_why() -> None:
    kit = kitout.attach(ZOO["llama"].build())
    kit.add("a", LoRA(rank=2), seed=0)
    kit.add("p", PromptTuning(length=2), seed=0)
    found = run(far(kit), None, spectrum=True, tokenizer=tokenizer())
    plain = json.loads(json.dumps(found.to_dict()))["spectra"]
    assert set(plain["a"]["by_role"]) == {"attn.q", "attn.v"}
    assert plain["a"]["total"] == found.spectra["a"].total > 0
    assert plain["p"]["refused"]
    assert "intruder dimensions of a" in str(found)
    assert "it has no form in weights: " in str(found)
    with pytest.raises(ConfigError, match="spectrum counts the intruder dimensions of adapters, and there is none"):
        run(kit, [], spectrum=True, tokenizer=tokenizer())
