"""train.compile and train.pad_to: the same run but for rounding, few shapes, graphs for the steps alone."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
import torch

from kitout import LoRA
from kitout.data.padding import pad, widened
from kitout.runtime.graphs.compile_blocks import compile as compile_kit
from kitout.train.loop import compiled_steps
from kitout.train.loop.compiled_steps import MAX_SHAPES, choose_lengths
from train import fixtures


def padded_tokens(shapes: dict[tuple[int, int], int], lengths: tuple[int, ...]) -> int:
    return sum(
        count * rows * min(one for one in lengths if one >= longest) for (rows, longest), count in shapes.items()
    )


def test_lengths_have_the_least_padding_and_few_shapes() -> None:
    rng = random.Random(0)
    for _ in range(20):
        shapes = {(4, 8 * rng.randint(1, 12)): rng.randint(1, 9) for _ in range(8)}
        chosen = choose_lengths(shapes)
        assert len(chosen) <= MAX_SHAPES
        longest = max(length for _, length in shapes)
        for _ in range(50):
            others = tuple({longest, *(8 * rng.randint(1, 12) for _ in range(MAX_SHAPES - 1))})
            if max(others) == longest:
                assert padded_tokens(shapes, chosen) <= padded_tokens(shapes, others)
    with_rest = choose_lengths({(4, 10): 5, (4, 200): 5, (4, 70): 3, (1, 13): 3})
    assert with_rest == (16, 72, 200)  # 4 x 16, 4 x 72, 4 x 200 and 1 x 16
    assert choose_lengths({(4, 100): 1}) == (104,)
    assert choose_lengths({}) == ()


def test_rows_are_padded_to_the_least_length_that_holds_them() -> None:
    rows, device = [[1, 2, 3], [4]], torch.device("cpu")
    with widened((2, 5, 9)):
        ids, mask = pad(rows, 0, "left", device)
        assert ids.tolist() == [[0, 0, 1, 2, 3], [0, 0, 0, 0, 4]]
        assert mask.sum(1).tolist() == [3, 1]
        assert pad([[1] * 10], 0, "right", device)[0].shape == (1, 10)
    assert pad(rows, 0, "right", device)[0].shape == (2, 3)


def run(folder: Path, **settings: object) -> tuple[list[float], fixtures.JobTrainer]:
    kit = fixtures.kit_of("llama")
    fixtures.add(kit, "a", LoRA(rank=2))
    items = fixtures.texts(24, low=4, high=40)
    job = fixtures.job("a", fixtures.causal(kit, ["a"], items), items, steps=6, batch=4, **settings)
    loop = fixtures.trained(kit, [job], folder, micro=2)
    return fixtures.losses(loop), loop


def test_a_compiled_run_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(compiled_steps, "compile_kit", partial(compile_kit, backend="eager"))
    eager, plain = run(tmp_path / "off")
    padded, _ = run(tmp_path / "padded", pad_to=(16, 24, 40))
    compiled, loop = run(tmp_path / "blocks", compile="blocks", activation_checkpointing=True)
    assert plain.step_runner.compiled.report is None
    assert padded == pytest.approx(eager, rel=1e-5)
    assert compiled == pytest.approx(eager, rel=1e-5)
    report = loop.step_runner.compiled.report
    assert report is not None
    assert set(report.kinds) == {"LoRA"}
    assert len({graph.shape for graph in report.graphs}) <= MAX_SHAPES
    assert not report.eager
    assert loop.step_runner.padded >= plain.step_runner.padded
    assert loop.kit.state.graphs is None
    assert not any(hook.graphs for hook in loop.kit.state.hooks.values())
    torch._dynamo.reset()
