"""The laws reach every method: each registered one has a case, and each of its settings is tried off its default.

Where a case has no place in a species, adding it raises and leaves nothing behind.
"""

from __future__ import annotations

import pytest

from kitout import Method
from kitout.errors import KitoutError
from kitout.method import registered_methods
from laws.activate import NAME, kit_of
from laws.cases import CASES, REFUSED, Case, name_of
from zoo import Specimen


@pytest.mark.parametrize("method", list(registered_methods()), ids=lambda m: m.__name__)
def test_every_method_has_a_case_for_each_setting(method: type[Method]) -> None:
    cases = [c.method for c in CASES if type(c.method) is method]
    assert cases, f"{method.__name__} is registered but no case in tests/laws/configs.py tries it"
    untried = [
        name
        for name, field in method.model_fields.items()
        if name not in ("targets", "layers") and all(getattr(c, name) == field.get_default() for c in cases)
    ]
    assert not untried, f"no case sets {untried} of {method.__name__}"


def test_names_are_unique() -> None:
    assert len({c.name for c in CASES}) == len(CASES)


@pytest.mark.parametrize(("specimen", "case"), REFUSED, ids=name_of)
def test_a_case_without_a_place_is_refused(specimen: Specimen, case: Case) -> None:
    kit = kit_of(specimen)
    with pytest.raises(KitoutError):
        kit.add(NAME, case.method)
    assert kit.names == []
