"""A linear probe of the frozen features: what the base already knows of the labels, without any adapter.

The heads of the base give back their input while it runs, so that its own code chooses and pools the features. A
logistic regression is fitted on those of the train split, its strength of decay by the validation split. It takes about
as long as a third of one epoch. It knows jobs and their forwards, no architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kitout.evaluate.metrics.language import LossSums
from kitout.train.loop import distributed
from kitout.train.loop.jobs import Job
from kitout.train.measure.predict import Predictions
from kitout.train.setup.job_datasets import Datasets
from kitout.train.setup.prepare import PreparedRun
from kitout.train.trunk.kept_inputs import within_trunk

MAX_TRAIN = 2000  # examples of the train split whose features are taken
MAX_SHARE = 0.5  # of the examples that training goes through: beyond that a probe is not cheap
ROWS = 16  # of one forward
DECAYS = (1e-3, 1e-2, 1e-1)


def predict_by_probe(run: PreparedRun, job: Job, dataset: Datasets, examples: Sequence[Any]) -> Predictions | None:
    """The probe's classes and losses on these examples; None where it is not cheap, or the base has no linear head."""
    num_classes = len(dataset.label_names)
    paths = [path.replace("/", ".") for path in run.kit[job.name].heads]
    heads = [run.kit.base.get_submodule(path) for path in paths]
    train = [] if dataset.preview else list(dataset.train[:MAX_TRAIN])
    is_cheap = len(train) <= MAX_SHARE * sum(map(len, job.batches))
    is_linear = bool(heads) and all(isinstance(head, nn.Linear) and head.in_features >= num_classes for head in heads)
    if not (train and is_cheap and is_linear) or distributed.world_size() > 1:
        return None
    with ExitStack() as stack:
        for head in heads:
            stack.callback(head.register_forward_hook(lambda _module, args, _output: args[0]).remove)
        stack.enter_context(run.kit.use(None))
        features = [_features(run, job, items) for items in (train, list(job.validation), examples)]
    if any(rows.ndim != 2 for rows in features):
        return None
    mean, spread = features[0].mean(0), features[0].std(0, correction=0) + 1e-6
    features = [(rows - mean) / spread if len(rows) else rows for rows in features]
    labels = [
        torch.tensor([dataset.reference_of(item) for item in items]) for items in (train, job.validation, examples)
    ]
    probes = [fit(features[0], labels[0], num_classes, decay) for decay in DECAYS]
    probe = probes[1]
    if len(labels[1]):
        probe = min(probes, key=lambda one: float(F.cross_entropy(features[1] @ one[0] + one[1], labels[1])))
    logits = features[2] @ probe[0] + probe[1]
    costs, predicted = F.cross_entropy(logits, labels[2], reduction="none"), logits.argmax(1)
    rows = zip(costs.tolist(), (predicted == labels[2]).tolist(), strict=True)
    return Predictions([LossSums(cost, 1, int(hit)) for cost, hit in rows], predicted.tolist())


@torch.no_grad()
def _features(run: PreparedRun, job: Job, items: Sequence[Any]) -> Tensor:
    parts = []
    for start in range(0, len(items), ROWS):
        few = list(items[start : start + ROWS])
        batch = job.objective.collate(few, None)
        with within_trunk(run.kit, job.objective, few, batch):
            logits = job.objective.losses(run.kit, batch, torch.ones(batch.num_examples, device=run.kit.device)).logits
        assert logits is not None
        parts.append(logits.float().cpu())
    return torch.cat(parts) if parts else torch.zeros(0, 1)


def fit(features: Tensor, labels: Tensor, num_classes: int, decay: float) -> tuple[Tensor, Tensor]:
    """Weight [d, C] and bias [C] of a logistic regression; decay: of the weight, in the mean loss."""
    weight = torch.zeros(features.shape[1], num_classes, requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(features @ weight + bias, labels) + decay / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach(), bias.detach()
