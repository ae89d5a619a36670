"""Images in the one loop: augmentation, heads and the cached trunk, each as configured, and none by default."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import kitout
from kitout.errors import ConfigError
from kitout.train.config.load import load
from kitout.train.config.schema import RunConfig
from kitout.train.metrics_log import read_metrics
from kitout.train.objectives.image_classification import ImageClassification
from kitout.train.setup.prepare import prepare
from kitout.train.trunk import image_features
from tiny_images import folder as pictures
from tiny_vision import folder as model_folder

pytest.importorskip("accelerate")

PROBE = {"name": "PartialFineTuning", "part": "head"}
LAST = {"name": "PartialFineTuning", "last": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images"), each=20)


def settings(model: Path, images: Path, out: Path, **more: Any) -> dict[str, Any]:
    """dtype and micro-batch are set: by default a timing and the free memory choose them, which a busy machine changes
    between two runs that are compared (loss 6e-3 apart between the dtypes, 3e-3 between micro-batches in bfloat16)."""
    own = {"train": str(images), "test": 12, "validation": 0, **more.pop("data", {})}
    train = {"batch_size": 8, "steps": 12, "lr": 1e-2, "head_lr": 1e-2, "micro_batch_size": 8}
    train |= more.pop("train", {})
    return {
        "model": {"name": str(model), "dtype": "float32"},
        "data": own,
        "train": train,
        "output": {"folder": str(out)},
        **more,
    }


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]


def run(model: Path, images: Path, out: Path, **more: Any) -> list[float]:
    kitout.train(settings(model, images, out, **more), log=lambda _: None)
    return losses(out)


@pytest.mark.parametrize(
    ("method", "head"),
    [(PROBE, "linear"), (LAST, "batchnorm"), ("AdaptFormer", "batchnorm"), ({"name": "VPT", "length": 2}, "linear")],
)
def test_with_a_cached_trunk_the_losses_are_the_same(
    model: Path, data: Path, tmp_path: Path, method: Any, head: str
) -> None:
    curves = [run(model, data, tmp_path / trunk, method=method, train={"head": head, "trunk": trunk})
             for trunk in ("auto", "off")]  # fmt: skip
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)
    assert len(curves[0]) == 12
    assert curves[1][-1] < curves[1][0]


class ImageCounter:
    """Counts the images that went through the first block."""

    def __init__(self, kit: Any) -> None:
        self.rows = 0
        kit.base.dinov2.encoder.layer[0].register_forward_hook(lambda _m, _i, out: self._add(out))

    def _add(self, out: Any) -> None:
        self.rows += len(out if torch.is_tensor(out) else out[0])


def steps(kit: Any, jobs: Sequence[Any]) -> None:
    from kitout.train.loop.step import StepRunner

    work = StepRunner(kit, jobs, 999)
    for step in range(len(jobs[0].batches)):
        rows = [(j, i) for j, job in enumerate(jobs) for i in job.batches[step]]
        work.step(kit, rows, step, torch.Tensor.backward, lambda _m: torch.enable_grad())


def prepared(model: Path, images: Path, tmp_path: Path, **more: Any) -> Any:
    config: RunConfig = load(settings(model, images, tmp_path / "out", **more))
    return prepare(config)


def test_each_image_passes_the_trunk_once_for_all_jobs_with_that_cut(model: Path, data: Path, tmp_path: Path) -> None:
    jobs = [{"name": "a", "method": PROBE}, {"name": "b", "method": PROBE, "train": {"lr": 1e-3, "seed": 5}}]
    ready = prepared(model, data, tmp_path, jobs=jobs, train={"trunk": "auto"})
    assert ready.datasets[0] is ready.datasets[1]  # read once
    assert image_features.keep_features(ready.kit, ready.jobs) == (dict.fromkeys("ab", "classifier"), [])
    counter = ImageCounter(ready.kit)
    steps(ready.kit, ready.jobs)
    assert counter.rows == len({i for job in ready.jobs for step in job.batches for i in step})
    assert [len(job.batches) * 8 for job in ready.jobs] == [96, 96]


def test_no_trunk_is_cached_where_it_cannot_be(model: Path, data: Path, tmp_path: Path) -> None:
    def is_cached(**more: Any) -> tuple[bool, list[str]]:
        ready = prepared(model, data, tmp_path, **more)
        cuts, notes = image_features.keep_features(ready.kit, ready.jobs)
        (objective,) = [job.objective for job in ready.jobs]
        assert isinstance(objective, ImageClassification)
        assert (objective.cached_logits_fn is not None) == bool(cuts)
        return bool(cuts), notes

    assert is_cached(method=PROBE, train={"trunk": "auto"})[0]
    assert is_cached(method=PROBE) == (False, [])  # unless it is requested
    assert is_cached(method="FullFineTuning", train={"trunk": "auto", "lr": 1e-4}) == (False, [])
    assert is_cached(method=PROBE, train={"trunk": "auto"}, data={"augment": {"rotate": 5}}) == (False, [])
    cached, notes = is_cached(method=PROBE, train={"trunk": "auto", "trunk_bytes": 100})
    assert not cached
    assert "too much memory" in notes[0]


def test_augmentation_changes_training_batches_alone_and_by_the_seed(model: Path, data: Path, tmp_path: Path) -> None:
    change = {"min_crop": 0.5, "horizontal_flip": True, "rotate": 20, "color_jitter": 0.3}
    (job,) = prepared(model, data, tmp_path, data={"augment": change, "validation": 4}).jobs
    (plain,) = prepared(model, data, tmp_path, data={"validation": 4}).jobs

    def pixels(one: Any, seeds: list[int] | None) -> torch.Tensor:
        return one.objective.collate([0, 1], seeds).inputs["pixel_values"]  # type: ignore[no-any-return]

    assert torch.equal(pixels(job, None), pixels(plain, None))
    assert torch.equal(pixels(plain, [1, 2]), pixels(plain, None))
    assert not torch.equal(pixels(job, [1, 2]), pixels(job, None))
    assert torch.equal(pixels(job, [1, 2]), pixels(job, [1, 2]))
    assert not torch.equal(pixels(job, [1, 3]), pixels(job, [1, 2]))


def test_a_batchnorm_head_updates_its_statistics_in_training_steps_only(
    model: Path, data: Path, tmp_path: Path
) -> None:
    run(model, data, tmp_path / "out", method="BitFit", train={"head": "batchnorm"}, data={"validation": 4})
    from safetensors.torch import load_file

    (file,) = (tmp_path / "out" / "adapter").glob("*.safetensors")
    tensors = load_file(file)
    (tracked,) = [value for key, value in tensors.items() if key.endswith("num_batches_tracked")]
    assert tracked.item() == 12  # neither the cost estimate nor an evaluation counts


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"objective": "classification", "data": {"augment": {"rotate": 5}}}, "data.augment is for images"),
        ({"objective": "causal_lm", "train": {"head": "batchnorm"}}, "train.head is for images"),
        ({"train": {"head": "batchnorm", "batch_size": 1}}, "no variance over one image"),
        ({"train": {"head": "batchnorm", "micro_batch_size": 4}}, "over a whole batch"),
        ({"data": {"augment": {"min_crop": 0}}}, "min_crop"),
    ],
)
def test_conflicting_settings(model: Path, data: Path, tmp_path: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(settings(model, data, tmp_path, **more))
