"""`kitout probe-sites` on tiny models: the table, JSON, pictures; and runs whose adapters start from data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import kitout
import tiny_models
from kitout import LoRA
from kitout.cli import app
from kitout.errors import ConfigError
from kitout.search import signals
from kitout.train.config.load import load
from kitout.train.objectives.causal_lm import CausalLM
from kitout.train.objectives.objective import Batch
from kitout.train.objectives.signals_of_items import signals_of_items, trained_positions
from kitout.train.setup.prepare import prepare
from train.fixtures import kit_of, texts


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("run")
    data = tiny_models.jsonl(folder / "reviews.jsonl", tiny_models.reviews(40))
    model = tiny_models.encoder(folder / "encoder")
    return {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"train": str(data)},
        "objective": "classification",
        "train": {"steps": 4, "batch_size": 8},
        "output": {"folder": str(folder / "out")},
    }


def test_the_verb(run: dict[str, object], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(run), encoding="utf-8")
    args = ["probe-sites", str(file), "--examples", "12", "--max-trainable-parameters", "2000"]
    result = CliRunner().invoke(app, [*args, "--out", str(tmp_path / "sites"), "--gora"])
    assert result.exit_code == 0, result.output
    assert "attention.output.dense" in result.stdout
    assert "2,000 trainable parameters" in result.stdout
    record = json.loads((tmp_path / "sites" / "signals.json").read_text())
    assert {path.name for path in (tmp_path / "sites").iterdir()} == {"signals.json", "sites.png", "sites.svg"}
    assert (tmp_path / "sites" / "sites.svg").read_text().count("attn.q") >= 1
    costs = {site["path"]: site["d_in"] + site["d_out"] for site in record["sites"]}
    assert len(costs) == 12
    assert set(record["ranks"]) == {"eva", "gora", "gradient", "uniform"}
    for ranks in record["ranks"].values():
        total = sum(costs[path] * rank for path, rank in ranks.items())
        assert 2000 - max(costs.values()) < total <= 2000
    assert not (tmp_path / "out").exists()
    refused = CliRunner().invoke(app, [*args, "--by", "snip"])
    assert refused.exit_code == 1
    assert "choose one of eva, gora, gradient" in refused.stderr


@pytest.mark.parametrize("init", ["eva", "loraga"])
def test_a_run_starts_its_adapter_from_its_data(run: dict[str, object], init: str) -> None:
    """The head is the one that the seed gives; the same start as by hand from the same items."""
    plain = prepare(load({**run, "method": {"name": "LoRA", "rank": 2}}))
    started = prepare(load({**run, "method": {"name": "LoRA", "rank": 2, "init": init}}))
    name = started.jobs[0].name
    adapter = started.kit[name]
    assert adapter.method == LoRA(rank=2, init=init)
    for old, new in zip(plain.kit[name].heads.parameters(), adapter.heads.parameters(), strict=True):
        assert torch.equal(old, new)
    for site in adapter.sites:
        a, b = adapter.delta(site).a, adapter.delta(site).b
        gram = a @ a.T if init == "eva" else a @ a.T * 16 / site.d_out**0.5
        torch.testing.assert_close(gram, torch.eye(2), rtol=0, atol=1e-4)
        assert b.any() == (init == "loraga")
    job = plain.jobs[0]
    items = [job.examples[i] for i in dict.fromkeys(i for step in job.batches for i in step)]
    found = signals_of_items(
        plain.kit, job.objective, items, heads=plain.kit[name].heads_by_path(), directions=2, loraga=2,
        seed=job.settings.seed,
    )  # fmt: skip
    by_hand = plain.kit.add("by-hand", adapter.method, start=found)
    for site in adapter.sites:
        assert torch.equal(by_hand.delta(site).a, adapter.delta(site).a)


@pytest.mark.slow
def test_a_run_with_such_an_adapter_ends_and_loads(run: dict[str, object], tmp_path: Path) -> None:
    method = {"name": "LoRA", "rank": {"bert.encoder.layer.0.attention.self.query": 2, "layer.1.output.dense": 3}}
    values = {**run, "method": {**method, "init": "eva"}, "output": {"folder": str(tmp_path / "out")}}
    kitout.train(values, log=lambda _line: None)
    predictor = kitout.load(tmp_path / "out" / "adapter")
    (adapter,) = (predictor.kit[name] for name in predictor.kit.names)
    assert sorted(adapter.delta(site).a.shape[0] for site in adapter.sites) == [2, 3]


def test_items_of_an_objective_are_its_batches() -> None:
    """The loss of a batch is the mean over its target tokens; inputs count where a target is predicted."""
    kit, items = kit_of("llama"), texts(6)
    objective = CausalLM(kit)
    found = signals(kit, items, objective=objective, batch_size=3, directions=4)
    batches = [objective.collate(items[:3], None), objective.collate(items[3:], None)]

    def mean(model: kitout.Kit, batch: Batch) -> torch.Tensor:
        number = batch.targets["labels"].numel()
        return objective.losses(model, batch, torch.full((3,), 1.0 / number)).total

    expected = signals(kit, batches, mean, positions=trained_positions, directions=4)
    number = sum(map(objective.num_targets, items))
    for path, site in found.items():
        assert site.num_positions == number
        assert site.gradient_energy == pytest.approx(expected[path].gradient_energy, rel=1e-5)
        assert site.explained_variance == pytest.approx(expected[path].explained_variance, rel=1e-4)
    with pytest.raises(ConfigError, match="has a target"):
        signals_of_items(kit, objective, [])
