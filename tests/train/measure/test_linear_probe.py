"""The probe reads what the base's own head reads, whatever chooses and pools it, and is fitted as it should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kitout.train.config.load import load
from kitout.train.measure import linear_probe
from kitout.train.setup.prepare import prepare
from tiny_images import folder as pictures
from tiny_models import decoder, encoder, jsonl, reviews, vision


@pytest.mark.parametrize("kind", ["encoder", "decoder", "images"])
def test_features_are_what_the_head_reads(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = {"encoder": encoder, "decoder": decoder, "images": vision}[kind]
    data = pictures(tmp_path / "d", each=20) if kind == "images" else jsonl(tmp_path / "d.jsonl", reviews(60))
    run = prepare(load({
        "model": {"name": str(make(tmp_path / "m")), "dtype": "float32"}, "data": {"train": str(data), "test": 12},
        **({} if kind == "images" else {"objective": "classification"}),
    }))  # fmt: skip
    (job,), (dataset,) = run.jobs, run.datasets
    *_, path = run.kit[job.name].heads
    head = run.kit.base.get_submodule(path.replace("/", "."))
    assert isinstance(head, nn.Linear)
    items = list(dataset.test)
    read: list[Any] = []
    own = linear_probe._features
    monkeypatch.setattr(linear_probe, "_features", lambda *a: read.append(own(*a)) or read[-1])
    predictions = linear_probe.predict_by_probe(run, job, dataset, items)
    assert predictions is not None
    with torch.no_grad():
        logits = job.objective.losses(run.kit, job.objective.collate(items, None), torch.ones(len(items))).logits
        if kind != "encoder":  # its pooler is new too, and gives back its input
            torch.testing.assert_close(head(read[2]), logits)
    assert len(predictions.predictions) == len(items)
    assert not head._forward_hooks
    if kind == "images":  # three colors
        truth = [dataset.reference_of(item) for item in items]
        assert sum(a == b for a, b in zip(predictions.predictions, truth, strict=True)) > 0.8 * len(items)


def test_it_is_left_out_where_it_is_not_cheap(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", reviews(60))
    model = {"name": str(encoder(tmp_path / "m")), "dtype": "float32"}
    run = prepare(load({"model": model, "data": str(data), "train": {"epochs": 1.0}}))
    assert linear_probe.predict_by_probe(run, run.jobs[0], run.datasets[0], list(run.datasets[0].test)) is None


def test_the_fit_is_the_minimum() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(80, 5), torch.randint(0, 3, (80,))
    weight, bias = linear_probe.fit(features, labels, 3, 0.1)
    weight.requires_grad_()
    loss = torch.nn.functional.cross_entropy(features @ weight + bias, labels) + 0.05 * weight.square().sum()
    (gradient,) = torch.autograd.grad(loss, [weight])
    assert float(gradient.abs().max()) < 1e-3
