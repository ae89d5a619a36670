"""Law 4: a routed row equals that row alone, for any mixture of all methods, in forward, backward and generate.

Each species gets batches whose rows have every case in turn, the base, a stack and a mix, with padding where it has
tokens; a row alone is the same row, padding included, in a batch of one. The gradients of an adapter are the sum of
those of its rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kitout import Kit, Mix, Stack
from laws.activate import added, assert_same, gradients, kit_of, loss_of, run
from laws.cases import CELLS, COSTLY, SPECIES, Case, Cell
from zoo import FIRST_TOKEN, Specimen, padded, rows_of

ROWS = 5  # cases per batch: few enough to see which one is wrong
Entry = str | Stack | Mix | None


def groups(specimen: Specimen, cells: Sequence[Cell]) -> list[list[Case]]:
    """The cases in batches that mix unlike methods: every n-th, so that neighbours in the table part."""
    cases = [c for s, c in cells if s is specimen and c.by_row(specimen)]
    n = -(-len(cases) // ROWS)
    return [cases[i::n] for i in range(n)]


def mixtures_of(cells: Sequence[Cell]) -> list[Any]:
    return [
        pytest.param(s, g, id=f"{s.name}-{'+'.join(c.name for c in g)}")
        for s in SPECIES.values()
        for g in groups(s, cells)
    ]


MIXTURES = mixtures_of(CELLS)
TALKERS = [p for p in mixtures_of(COSTLY) if p.values[0].generates]
SIDES = [  # pictures have no padding: once is enough
    pytest.param(*p.values, side, id=f"{side}-{p.id}")
    for p in MIXTURES
    for side in (("left", "right") if p.values[0].is_text else ("right",))
]
mixtures = pytest.mark.parametrize(("specimen", "group"), MIXTURES)
talkers = pytest.mark.parametrize(("specimen", "group"), TALKERS)


def rows_with(group: list[Case]) -> list[Entry]:
    """Every name, the base, a name twice, and a stack and a mix of the first and the last that can be mixed."""
    names, mixed = [c.name for c in group], [c.name for c in group if c.mixes]
    rows: list[Entry] = [names[0], None, *names[1:], names[0]]
    if len(mixed) > 1:
        rows += [Stack(mixed[-1], mixed[0]), Mix({mixed[0]: 0.4, mixed[-1]: -0.3})]
    return rows


def uneven(specimen: Specimen, rows: int, side: str = "right") -> dict[str, Tensor]:
    batch = specimen.batch(rows, 0)
    if not specimen.is_text:
        return batch
    lengths = [7 - (3 * i) % 5 for i in range(rows)]
    return padded(batch, lengths, "left" if side == "left" else "right", specimen.pad_id)


@pytest.mark.parametrize(("specimen", "group", "side"), SIDES)
def test_each_row_is_as_it_would_be_alone(specimen: Specimen, group: list[Case], side: str) -> None:
    kit = kit_of(specimen)
    with added(kit, *group):
        rows = rows_with(group)
        batch = uneven(specimen, len(rows), side)
        with kit.use(rows):
            together = run(kit, batch)
        for i, entry in enumerate(rows):
            with kit.use(entry):
                assert_same(together[i : i + 1], run(kit, rows_of(batch, i)), what=f"row {i} with {entry}")
        assert_same(together[1:2], run(kit, rows_of(batch, 1)), what="the base row")
        with kit.use(rows[::-1]):
            assert_same(run(kit, rows_of(batch, *reversed(range(len(rows))))), together.flip(0), what="rows reversed")


@mixtures
def test_gradients_are_those_of_its_rows_alone(specimen: Specimen, group: list[Case]) -> None:
    kit = kit_of(specimen)
    with added(kit, *group) as names:
        rows = rows_with(group)
        batch = uneven(specimen, len(rows))
        with kit.use(rows):
            loss_of(kit(**batch)).backward()
        together = {name: gradients(kit[name]) for name in names}
        kit.zero_grad(set_to_none=True)
        for i, entry in enumerate(rows):
            with kit.use(entry):
                output = kit(**rows_of(batch, i))
                if (loss := loss_of(output)).requires_grad:
                    loss.backward()
        for name in (case.name for case in group if case.trains):
            alone = gradients(kit[name])
            scale = max(g.abs().max().item() for g in alone.values())
            for n, gradient in alone.items():
                assert_same(together[name][n] / scale, gradient / scale, what=f"gradient of {n} of {name}")


SEARCHES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams, two returned": {"num_beams": 3, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static", "disable_compile": True},  # which GPUs would
    "samples of the likeliest": {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
}


@talkers
@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES.keys())
def test_each_row_generates_as_it_would_alone(specimen: Specimen, group: list[Case], search: dict[str, Any]) -> None:
    kit = kit_of(specimen)
    with added(kit, *group):
        rows = rows_with(group)
        batch = prompts(specimen, len(rows))
        with kit.use(rows):
            together = generate(kit, batch, **search)
        per_row = len(together) // len(rows)
        for i, entry in enumerate(rows):
            with kit.use(entry):
                alone = generate(kit, rows_of(batch, i), **search)
            assert torch.equal(together[i * per_row : (i + 1) * per_row], alone), f"row {i} with {entry}"


def prompts(specimen: Specimen, rows: int) -> dict[str, Tensor]:
    batch = uneven(specimen, rows, "left" if specimen.kind == "decoder" else "right")
    batch.pop("decoder_input_ids", None)
    return batch


def generate(kit: Kit, batch: dict[str, Tensor], **search: Any) -> Tensor:
    torch.manual_seed(0)
    ban = [[i] for i in range(FIRST_TOKEN)]  # no pad or end in the answers, which would hide what follows
    return kit.generate(**batch, max_new_tokens=4, min_new_tokens=4, bad_words_ids=ban, **search)
