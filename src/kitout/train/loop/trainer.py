"""The training loop: transformers.Trainer around a kit, with our own step, checks, evaluation and checkpoints.

Trainer brings accelerate, callbacks, trackers and the order of events. `StepRunner` does the work of one optimizer
step, `Health` checks its gradients, `checkpoints` writes the files. It knows jobs, and nothing of data files, screens
or methods.
"""

from __future__ import annotations

import contextlib
import errno
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from kitout.base import memory
from kitout.base.eval_mode import eval_mode
from kitout.errors import ConfigError
from kitout.kit import Kit
from kitout.train import checkpoints
from kitout.train.loop import distributed
from kitout.train.loop.base_mode import training_mode
from kitout.train.loop.fsdp import is_sharded, shard
from kitout.train.loop.health import Health
from kitout.train.loop.jobs import Job, build_optimizer, build_scheduler
from kitout.train.loop.step import StepRows, StepRunner
from kitout.train.loop.step_data import StepData
from kitout.train.loop.stop_on_signal import StopOnSignal
from kitout.train.loop.training_arguments import adjust_arguments

EvaluateFn = Callable[[], dict[str, float]]


class StepDataset(Dataset[StepRows], Sequence[StepRows]):
    """Every optimizer step of a run as its rows: job by job, so that neighbors have the same adapter active."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs

    def __len__(self) -> int:
        return max(len(job.batches) for job in self.jobs)

    def __getitem__(self, step: int) -> StepRows:
        return [(j, i) for j, job in enumerate(self.jobs) if step < len(job.batches) for i in job.batches[step]]


class JobTrainer(Trainer):  # type: ignore[misc]
    """Trains the jobs' adapters on one kit. micro_batch_size: rows of one forward at most; default a whole step."""

    folder: Path
    """Of the checkpoints and of diverged.json."""
    run_id: str
    """Written into checkpoints; a run with another id may not resume from them."""
    evaluate_fn: EvaluateFn | None
    """Evaluates during training: metrics by `eval_<name>`."""
    num_checkpoints: int
    """How many of the newest are kept, besides the best."""
    cuts: dict[str, str]
    """By job: the module at which its frozen trunk is cut (train.trunk)."""
    loss_sum_before: tuple[float, float]
    """Of all steps before this call: the loss summed up to the last log, and since then."""
    is_evaluating: bool
    """In `evaluate_fn`, or left by its error."""
    step_data: StepData | None
    """Makes the examples while training; None: the jobs have them."""

    def __init__(
        self,
        kit: Kit,
        jobs: Sequence[Job],
        folder: Path,
        args: TrainingArguments,
        *,
        run_id: str = "",
        evaluate_fn: EvaluateFn | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        micro_batch_size: int | None = None,
        num_checkpoints: int = 2,
        step_data: StepData | None = None,
    ) -> None:
        self.kit, self.jobs, self.folder = kit, list(jobs), folder
        self.run_id, self.evaluate_fn, self.num_checkpoints = run_id, evaluate_fn, num_checkpoints
        self.step_data = step_data
        self.step_dataset = StepDataset(jobs)
        args.device  # noqa: B018 - reading it joins the other processes
        adjust_arguments(args, len(self.step_dataset), len(jobs))
        if any(job.settings.fsdp for job in jobs) and not is_sharded(kit):
            shard(kit)
        self.cuts, self.loss_sum_before, self.is_evaluating = {}, (0.0, 0.0), False
        self.stop_on_signal = StopOnSignal()
        self.step_runner = StepRunner(kit, jobs, micro_batch_size or max(len(self.step_dataset[0]), 1))
        self.health = Health(kit, jobs, folder, has_fixed_data=step_data is None)
        with _restored_config(kit):
            super().__init__(
                model=kit, args=args, train_dataset=self.step_dataset, eval_dataset=self.step_dataset,
                callbacks=[SaveOnEvaluate(), RestoreLossSum(self), AfterStep(self), self.stop_on_signal, *callbacks],
            )  # fmt: skip
        self.remove_callback(PrinterCallback)
        self.control: TrainerControl
        self._created_lr_scheduler: bool

    # ---- what Trainer calls ----------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[StepRows]:
        return DataLoader(self.step_dataset, batch_size=1, shuffle=False, collate_fn=lambda rows: rows[0])

    def get_batch_samples(self, epoch_iterator: Iterator[StepRows], num_batches: int, device: Any) -> Any:
        return [rows for rows in [next(epoch_iterator, None)] if rows is not None], None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = build_optimizer(self.jobs, [self.kit[job.name] for job in self.jobs])
        self.optimizer = optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if not self._created_lr_scheduler:
            self.lr_scheduler: Any = build_scheduler(self.jobs, self.optimizer)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        names = [job.name for job in self.jobs]
        self.kit.train_only(*names)
        if resume_from_checkpoint is not None and self._restore_if_ended(Path(resume_from_checkpoint)):
            return None
        checkpointing, self.args.activation_checkpointing = self.args.activation_checkpointing, False
        compiled = self.step_runner.compiled_blocks(self.step_dataset)
        try:  # Trainer would enable it again, in its own way
            with training_mode(self.kit, names, bool(checkpointing)), compiled, self.stop_on_signal.watch():
                output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.args.activation_checkpointing = checkpointing
        if self.args.should_save:  # a kill behind the last checkpoint may have left more than are kept
            with contextlib.suppress(OSError):
                checkpoints.prune(self.folder, self.num_checkpoints, self.state.best_global_step)
        return output

    def _restore_if_ended(self, path: Path) -> bool:
        """Restores a run that had stopped early when it was saved; it must not train another step."""
        if not checkpoints.read_progress(path)["ended"]:
            return False
        self._load_from_checkpoint(str(path))
        self.state = TrainerState.load_from_json(str(path / checkpoints.STATE))
        return True

    def training_step(self, model: nn.Module, inputs: StepRows, num_items_in_batch: Any = None) -> Tensor:
        rows = [(j, i) for j, i in inputs if self.jobs[j].name not in self.health.diverged]
        if not rows:  # every job that had steps left has diverged
            self.control.should_training_stop = True
            return torch.zeros((), device=self.args.device)
        if self.step_data is not None:
            with self.step_runner.timed():
                self.step_data.before_step(self.state.global_step)
        accelerator = self.accelerator
        return self.step_runner.step(model, rows, self.state.global_step, accelerator.backward, accelerator.no_sync)

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Nothing: `_get_grad_norm` clips each job by its own norm."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        return self.health.clip(self.state.global_step)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.health.check_effect(self.state.global_step)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # ---- logs and evaluation ------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Losses are per target token and metrics per example since the last log; counts of the run, all processes."""
        if "loss" in logs:
            losses = self.step_runner.pop_losses()
            counts = distributed.all_gather([(self.step_runner.tokens, self.step_runner.processor_seconds)])
            tokens, processor_seconds = (sum(values) for values in zip(*counts, strict=True))
            seconds = self.step_runner.seconds
            logs |= {"loss": sum(losses.values()) / max(1, len(losses))}
            logs |= {f"{name}/loss": loss for name, loss in losses.items()} if len(self.jobs) > 1 else {}
            logs |= {"tokens": tokens, "tokens_per_second": tokens / max(seconds, 1e-9), "seconds": seconds}
            logs |= {"processor_seconds": processor_seconds}
            logs |= {"memory": memory.peak(self.args.device)}
            logs |= {} if self.step_data is None else self.step_data.metrics()
            metrics = self.step_runner.pop_metrics()
            if taken := metrics.keys() & {*logs, "epoch", "step"}:
                raise ValueError(f"an objective measures {', '.join(sorted(taken))}: a log has its own of that name")
            logs |= metrics
        if "train_loss" in logs:  # of the whole run; Trainer's is of the steps since a resume
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The metrics of `evaluate_fn`, which are logged and given to the callbacks."""
        self.is_evaluating = True  # and stays so after an error
        with eval_mode(self.kit.base, self.kit):
            metrics = self.evaluate_fn() if self.evaluate_fn is not None else {}
        self.is_evaluating = False
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """No checkpoint is the best one before every adapter has the size it ends with."""
        settled = max(self.kit[job.name].method.settled_after(len(job.batches)) for job in self.jobs)
        return self.state.global_step >= settled and bool(super()._determine_best_metric(metrics, trial))

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """One folder, complete or not there. A full disk costs this checkpoint and no earlier one."""
        counts = self.step_runner.state()  # by all processes
        losses_since_log = distributed.all_gather([self._tr_loss.item()])
        if self.args.should_save:
            step = self.state.global_step
            for stateful in (*self.callback_handler.callbacks, self.control):
                if isinstance(stateful, ExportableState):
                    self.state.stateful_callbacks[type(stateful).__name__] = stateful.state()
            progress = {
                "run": self.run_id,
                **counts,
                "loss_sum": [self._total_loss_scalar, losses_since_log],
                "stopped": self.health.diverged,
                "ended": self.control.should_training_stop and step < self.args.max_steps,
                "scheduler": {k: v for k, v in self.lr_scheduler.state_dict().items() if k != "lr_lambdas"},
            }
            trainer_state = json.dumps(asdict(self.state))
            step_data: dict[str, Tensor] = {}
            if self.step_data is not None:
                progress["step_data"], step_data = self.step_data.state()
            try:
                checkpoints.save(
                    self.folder, step, self.trained_tensors(), self.optimizer, progress, trainer_state, step_data
                )
                checkpoints.prune(self.folder, self.num_checkpoints, self.state.best_global_step)
            except OSError as error:
                reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
                warnings.warn(
                    f"no checkpoint of step {step} ({reason}); earlier ones are untouched, and training continues",
                    RuntimeWarning, stacklevel=2,
                )  # fmt: skip
        distributed.barrier()

    def trained_tensors(self) -> dict[str, Tensor]:
        """All parameters and buffers of the adapters, by job and name."""
        return {
            f"{job.name}/{name}": value
            for job in self.jobs
            for name, value in [*self.kit[job.name].named_parameters(), *self.kit[job.name].named_buffers()]
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint)
        progress = checkpoints.read_progress(path)
        if progress["run"] != self.run_id:
            raise ConfigError(
                f"{path} belongs to another run (its data, model or versions differ from this one's): choose another "
                "output.folder, or delete this one"
            )
        checkpoints.load_values(path, self.trained_tensors())
        runner, requested = self.step_runner, self.step_runner.micro_batch_size
        runner.restore(progress)
        runner.micro_batch_size = min(runner.micro_batch_size, requested)  # a run short of memory may resume with less
        self.health.diverged = progress["stopped"]
        if self.step_data is not None:
            self.step_data.restore(progress["step_data"], checkpoints.read_step_data(path))
        if "loss_sum" in progress:  # not in checkpoints of earlier versions
            total, since_log = progress["loss_sum"]
            is_same_number = len(since_log) == distributed.world_size()
            own = distributed.my_slice(since_log) if is_same_number else since_log
            self.loss_sum_before = total, sum(own) / len(own)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        scheduler = checkpoints.read_progress(Path(checkpoint))["scheduler"]
        checkpoints.load_optimizer(Path(checkpoint), self.optimizer)
        self.lr_scheduler.load_state_dict({**self.lr_scheduler.state_dict(), **scheduler})
        for group, lr in zip(self.optimizer.param_groups, scheduler["_last_lr"], strict=True):
            group["lr"] = lr

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to do: random draws follow from the seed and the step."""

    def load_best(self) -> int | None:
        """Loads the best checkpoint's values; the step they are of, or None without an evaluation."""
        best = self.state.best_global_step
        if not best or best == self.state.global_step:
            return best
        path = self.folder / f"{checkpoints.PREFIX}{best}"
        if not path.exists():  # the disk was full when it was to be written
            warnings.warn(f"the best checkpoint {path} does not exist: the last step's values are kept", stacklevel=2)
            return int(self.state.global_step)
        checkpoints.load_values(path, self.trained_tensors())
        return best


class SaveOnEvaluate(TrainerCallback):  # type: ignore[misc]
    """A checkpoint with every evaluation, so that the best one is there."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_save = control.should_save or control.should_evaluate
        return control


class AfterStep(TrainerCallback):  # type: ignore[misc]
    """Lets the adapters' methods see what each optimizer step has done, while its gradients are there."""

    def __init__(self, trainer: JobTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        for job in self.trainer.jobs:
            if state.global_step < len(job.batches) and job.name not in self.trainer.health.diverged:
                self.trainer.kit[job.name].after_step(state.global_step, len(job.batches))


class RestoreLossSum(TrainerCallback):  # type: ignore[misc]
    """The mean loss that is logged at the end covers the steps before a resume too, to the bit."""

    def __init__(self, trainer: JobTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        total, since_log = self.trainer.loss_sum_before
        self.trainer._total_loss_scalar += total
        self.trainer._tr_loss += since_log
        self.trainer.loss_sum_before = 0.0, 0.0


@contextlib.contextmanager
def _restored_config(kit: Kit) -> Iterator[None]:
    """Trainer turns use_cache off in the model's config; our calls pass it themselves, so the config is restored."""
    missing = object()
    use_cache = kit.config.__dict__.get("use_cache", missing)
    try:
        yield
    finally:
        if use_cache is missing:
            kit.config.__dict__.pop("use_cache", None)
        else:
            kit.config.use_cache = use_cache
