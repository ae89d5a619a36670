"""Law 6: merged equals attached, unmerge restores the bits, and a merged model reloads with transformers alone.

Where no weights give the same function, or where transformers could not bring them back, NotMergeable names a site and
nothing changes; `activate` predicts where that is from the sites alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kitout import Kit, Mix, Stack
from kitout.errors import NotMergeable
from kitout.runtime.merge.fold import fold_all
from laws.activate import activated, added, assert_base_bits, assert_same, gains_keys, kit_of, run, unmergeable
from laws.cases import CASES, CELLS, SPECIES, Case, name_of
from zoo import DEVICE, Specimen

cells = pytest.mark.parametrize(("specimen", "case"), CELLS, ids=name_of)


@cells
def test_merged_equals_attached_and_unmerge_restores_the_bits(specimen: Specimen, case: Case) -> None:
    kit, batch = kit_of(specimen), specimen.batch(2, 0)
    base = run(kit, batch)
    with activated(kit, case) as adapter:
        want = {}
        for strength in (1.0, 0.7) if case.strengths else (1.0,):
            kit.strength(case.name, strength)
            want[strength] = run(kit, batch)
        refused = unmergeable(adapter)
        for strength, value in want.items():
            kit.strength(case.name, strength)
            if refused:
                with pytest.raises(NotMergeable) as error:
                    kit.merge(case.name)
                assert any(path in str(error.value) for path in refused), "the message names no site"
                assert not kit.merged
                assert_same(run(kit, batch), value, 0.0, "attached, after a refused merge")
                continue
            kit.merge(case.name)
            merged = run(kit, batch)
            kit.unmerge()
            assert_same(merged, value, what=f"merged at strength {strength}")
        assert_base_bits(kit)
        with kit.use(None):
            assert torch.equal(run(kit, batch), base)


@cells
def test_a_merged_model_reloads_with_transformers_alone(specimen: Specimen, case: Case, tmp_path: Path) -> None:
    kit, batch = kit_of(specimen), specimen.batch(2, 0)
    with activated(kit, case) as adapter:
        want = run(kit, batch)
        refused = unmergeable(adapter)
        if refused or (gains_keys(adapter) and hasattr(kit.base, "save_pretrained")):
            with pytest.raises(NotMergeable) as error:
                kit.merged_copy(case.name)
            places = refused or {s.path for s in adapter.sites}
            assert any(path in str(error.value) for path in places), "the message names no site"
            if not refused:
                assert_same(run(kit.merged_copy(case.name, check_saveable=False), batch), want, what="in memory")
            return
        plain = kit.merged_copy(case.name)
        assert_plain(plain, kit.base)
        assert_same(run(plain, batch), want, what="the merged copy")
        assert_base_bits(kit)
    if hasattr(plain, "save_pretrained"):
        plain.save_pretrained(tmp_path)
        assert_same(run(reloaded(plain, tmp_path), batch), want, what="reloaded")


def assert_plain(model: nn.Module, base: nn.Module) -> None:
    """No trace of kitout: classes, attributes, keys."""
    for name, module in model.named_modules():
        assert not type(module).__module__.startswith("kitout"), name
        assert not any("kitout" in c for cls in type(module).__mro__ for c in vars(cls)), name
        assert not any("kitout" in attribute for attribute in vars(module)), name
    if hasattr(model, "save_pretrained"):
        assert list(model.state_dict()) == list(base.state_dict())


def reloaded(model: nn.Module, folder: Path) -> nn.Module:
    again, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    assert not report["mismatched_keys"], report
    return again.to(DEVICE).eval()


PAIRS = [
    (s, a, b)
    for s in SPECIES.values()
    for a, b in zip(CASES, CASES[1:] + CASES[:1], strict=True)
    if a.method.mergeable and b.method.mergeable and all(c.is_tried_on(s) and not c.refused(s) for c in (a, b))
]


@pytest.mark.parametrize(("specimen", "first", "second"), PAIRS, ids=name_of)
def test_merging_two_is_wearing_a_stack_in_that_order(specimen: Specimen, first: Case, second: Case) -> None:
    kit, batch = kit_of(specimen), specimen.batch(2, 0)
    with added(kit, first, second) as names:
        if any(unmergeable(kit[n]) for n in names):
            with pytest.raises(NotMergeable):
                kit.merge(*names)
            return
        for order in (names, names[::-1]):
            kit.strength(order[0], 0.6)
            with kit.use(Stack(*order)):
                want = run(kit, batch)
            kit.merge(*order)
            assert_same(run(kit, batch), want, what=" then ".join(order))
            kit.unmerge()
            kit.strength(order[0], 1.0)


MIXED = ("lora-all", "ia3-qkv", "bitfit-v", "lora-input", "partial-norms", "full-blocks", "ssf-v")


@pytest.mark.parametrize("specimen", SPECIES.values(), ids=name_of)
def test_merging_a_mix_is_using_it(specimen: Specimen) -> None:
    kit, batch = kit_of(specimen), specimen.batch(2, 0)
    with added(kit, *(c for c in CASES if c.name in MIXED and not c.refused(specimen))) as names:
        names = [n for n in names if not unmergeable(kit[n])]
        weights = dict(zip(names, (0.7, -0.4, 0.5, 0.3, 0.6, 0.2, 0.8), strict=False))
        half = len(names) // 2
        for entry in (Mix(weights), Mix({Stack(*names[:half]): 0.6, Stack(*names[half:]): 0.5})):
            with kit.use(entry):
                want = run(kit, batch)
            kit.merge(entry)
            assert_same(run(kit, batch), want, what=f"merged {entry}")
            kit.unmerge()
        assert_arithmetic(kit, weights)


def assert_arithmetic(kit: Kit, weights: dict[str, float]) -> None:
    """A merged Mix is base + sum_i w_i (merged_i - base), parameter by parameter."""
    adapters = {name: kit[name] for name in weights}
    mixed = fold_all(adapters, Mix(weights))
    changes: dict[tuple[str, str], Tensor] = {}
    for name, weight in weights.items():
        for path, folded in fold_all(adapters, name).items():
            for key, value in folded.parameters.items():
                change = weight * (value - base_value(kit, path, key))
                changes[path, key] = changes.get((path, key), 0.0) + change
    assert {(path, key) for path, folded in mixed.items() for key in folded.parameters} == set(changes)
    for (path, key), change in changes.items():
        assert_same(mixed[path].parameters[key], base_value(kit, path, key) + change, what=f"{path} {key}")


def base_value(kit: Kit, path: str, key: str) -> Tensor | float:
    owner, _, name = f"{path}.{key}".strip(".").rpartition(".")
    value = kit.base.get_submodule(owner)._parameters.get(name)  # no parameter: a bias that the module lacks
    return 0.0 if value is None else value.detach()


@pytest.mark.parametrize("specimen", [s for s in SPECIES.values() if s.tied], ids=name_of)
def test_merging_one_use_of_a_tied_table_leaves_the_other(specimen: Specimen) -> None:
    kit, batch = kit_of(specimen), specimen.batch(2, 0)
    case = next(c for c in CASES if c.name == "lora-head")
    with activated(kit, case):
        want = run(kit, batch)
        plain = kit.merged_copy(case.name)
    table, head = plain.get_input_embeddings().weight, plain.get_output_embeddings().weight
    assert table is not head
    assert torch.equal(table, kit.base.get_input_embeddings().weight)
    assert_same(run(plain, batch), want)
