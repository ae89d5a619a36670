"""Law 7: the count equals the closed form, the tensors and `requires_grad`."""

from __future__ import annotations

import pytest

import kitout
from kitout import LoRA
from kitout.errors import ConfigError
from laws.activate import activated, kit_of
from laws.cases import TRAINED, Case, name_of
from zoo import ZOO, Specimen


@pytest.mark.parametrize(("specimen", "case"), TRAINED, ids=name_of)
def test_the_count_is_the_closed_form_and_requires_grad(specimen: Specimen, case: Case) -> None:
    kit = kit_of(specimen)
    base = sum(p.numel() for p in kit.base.parameters())
    with activated(kit, case) as adapter:
        parameters = list(adapter.parameters())
        values = sum(p.numel() for p in parameters)
        assert values > 0
        cost = kit.num_parameters(case.name)
        assert cost.trainable == cost.total == cost.formula == values
        assert cost.trainable == case.method.num_parameters(adapter.sites)
        assert cost.trainable == sum(p.numel() for p in kit.parameters() if p.requires_grad)
        assert cost.bytes == sum(p.numel() * p.element_size() for p in parameters) == 4 * values
        assert cost.percent == pytest.approx(100 * values / base)
        assert not any(p.requires_grad for p in kit.base.parameters())
        kit.train_only()
        cost = kit.num_parameters(case.name)
        assert (cost.trainable, cost.total) == (0, values)
        assert sum(v.numel() for v in kit.state_dict().values()) >= values


def test_base_and_adapters_are_counted_together_as_transformers_does() -> None:
    kit = kitout.attach(ZOO["llama"].build())
    base = kit.base.num_parameters()  # type: ignore[operator]
    tables = base - kit.base.num_parameters(exclude_embeddings=True)  # type: ignore[operator]
    assert kit.num_parameters() == base
    kit.add("a", LoRA(rank=2))
    own = kit.num_parameters("a").total
    assert kit.num_parameters() == base + own
    assert kit.num_parameters(only_trainable=True) == own
    assert kit.num_parameters(exclude_embeddings=True) == base + own - tables
    with pytest.raises(ConfigError, match="takes no options"):
        kit.num_parameters("a", only_trainable=True)  # type: ignore[call-overload]
