"""The loop: transformers.Trainer around a kit, with our own step, checks, evaluation and checkpoints.

Trainer brings accelerate, callbacks, trackers and the order of things; `step` does the work of one optimiser step,
`health` looks at its gradients, `keep` writes checkpoints. It knows jobs, and nothing of files of examples, of screens
or of methods.
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
from kitout.errors import ConfigError, Faults
from kitout.kit import Kit
from kitout.train import checkpoints
from kitout.train.loop import distributed
from kitout.train.loop.base_mode import at_work
from kitout.train.loop.fsdp import shard, sharded
from kitout.train.loop.health import Health
from kitout.train.loop.jobs import Job, optimiser, scheduler
from kitout.train.loop.step import Rows, Work

Watch = Callable[[], dict[str, float]]


class Steps(Dataset[Rows]):
    """Every optimiser step of a run as its rows: job by job, so that neighbours wear the same."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs

    def __len__(self) -> int:
        return max(len(job.steps) for job in self.jobs)

    def __getitem__(self, step: int) -> Rows:
        return [(j, i) for j, job in enumerate(self.jobs) if step < len(job.steps) for i in job.steps[step]]


class Loop(Trainer):  # type: ignore[misc]
    """Trains the jobs' adapters, which share one objective's kind of forward.

    folder: of the checkpoints. watch: measures during training, `eval_...` figures. run: who may continue this one.
    micro: rows of one forward; default a whole step. kept: checkpoints, besides the best.
    """

    def __init__(
        self, kit: Kit, jobs: Sequence[Job], folder: Path, args: TrainingArguments, *, run: str = "",
        watch: Watch | None = None, callbacks: Sequence[TrainerCallback] = (), micro: int | None = None, kept: int = 2,
    ) -> None:  # fmt: skip
        self.kit, self.jobs, self.folder, self.run, self.watch, self.kept = kit, list(jobs), folder, run, watch, kept
        self.steps = Steps(jobs)
        args.device  # noqa: B018 - asked for it, the arguments join the other processes
        _settled(args, len(self.steps), len(jobs))
        if any(job.settings.shard for job in jobs) and not sharded(kit):
            shard(kit)
        self.cuts: dict[str, str] = {}  # by job, where what its frozen trunk computes is kept
        self.work = Work(kit, jobs, micro or max(len(self.steps[0]), 1))
        self.health = Health(kit, jobs, folder)
        with _config_as_found(kit):
            super().__init__(
                model=kit, args=args, train_dataset=self.steps, eval_dataset=self.steps,
                callbacks=[SaveWhenMeasured(), *callbacks],
            )  # fmt: skip
        self.remove_callback(PrinterCallback)
        self.control: TrainerControl
        self._created_lr_scheduler: bool

    # ---- what Trainer asks for ----------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Rows]:
        return DataLoader(self.steps, batch_size=1, shuffle=False, collate_fn=lambda rows: rows[0])

    def get_batch_samples(self, epoch_iterator: Iterator[Rows], num_batches: int, device: Any) -> Any:
        return [rows for rows in [next(epoch_iterator, None)] if rows is not None], None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        made = optimiser(self.jobs, [self.kit[job.name] for job in self.jobs])
        self.optimizer = made
        return made

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if not self._created_lr_scheduler:
            self.lr_scheduler: Any = scheduler(self.jobs, self.optimizer)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        names = [job.name for job in self.jobs]
        self.kit.train_only(*names)
        if resume_from_checkpoint is not None and self._ended(Path(resume_from_checkpoint)):
            return None
        checkpointing, self.args.activation_checkpointing = self.args.activation_checkpointing, False
        try:  # Trainer would switch it on once more, in its own way
            with at_work(self.kit, names, bool(checkpointing)):
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.args.activation_checkpointing = checkpointing

    def _ended(self, path: Path) -> bool:
        """Puts a run back that had stopped early when it was saved: one more step would be one too many."""
        if not checkpoints.progress_of(path)["ended"]:
            return False
        self._load_from_checkpoint(str(path))
        self.state = TrainerState.load_from_json(str(path / checkpoints.STATE))
        return True

    def training_step(self, model: nn.Module, inputs: Rows, num_items_in_batch: Any = None) -> Tensor:
        rows = [(j, i) for j, i in inputs if self.jobs[j].name not in self.health.stopped]
        if not rows:  # whoever had steps left has diverged
            self.control.should_training_stop = True
            return torch.zeros((), device=self.args.device)
        accelerator = self.accelerator
        return self.work.step(model, rows, self.state.global_step, accelerator.backward, accelerator.no_sync)

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """By each job's own norm, below."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        return self.health.clip(self.state.global_step)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.health.check_effect(self.state.global_step)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # ---- logs and evaluation ------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Losses are per learnt term since the last log; counts are of all processes since the run began."""
        if "loss" in logs:
            losses = self.work.drain()
            counted = distributed.gathered([(self.work.tokens, self.work.processor_seconds)])
            tokens, processor = (sum(of) for of in zip(*counted, strict=True))
            seconds = self.work.seconds
            logs |= {"loss": sum(losses.values()) / max(1, len(losses))}
            logs |= {f"{name}/loss": loss for name, loss in losses.items()} if len(self.jobs) > 1 else {}
            logs |= {"tokens": tokens, "tokens_per_second": tokens / max(seconds, 1e-9), "seconds": seconds}
            logs |= {"processor_seconds": processor}
            logs |= {"memory": memory.peak(self.args.device)}
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """What `watch` measures, logged and told to the callbacks."""
        with eval_mode(self.kit.base, self.kit):
            found = self.watch() if self.watch is not None else {}
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """One folder, whole or not there. A disk that is full costs this checkpoint and nothing that was kept."""
        counted = self.work.state()
        if self.args.should_save:
            for part in (*self.callback_handler.callbacks, self.control):
                if isinstance(part, ExportableState):
                    self.state.stateful_callbacks[type(part).__name__] = part.state()
            scheduled = {k: v for k, v in self.lr_scheduler.state_dict().items() if k != "lr_lambdas"}
            ended = self.control.should_training_stop and self.state.global_step < self.args.max_steps
            progress = {"run": self.run, **counted, "stopped": self.health.stopped, "ended": ended}
            progress["scheduler"] = scheduled
            state = json.dumps(asdict(self.state))
            try:
                checkpoints.write(self.folder, self.state.global_step, self.values(), self.optimizer, progress, state)
                checkpoints.rotate(self.folder, self.kept, self.state.best_global_step)
            except OSError as wrong:
                why = "the disk is full" if wrong.errno == errno.ENOSPC else str(wrong)
                warnings.warn(
                    f"no checkpoint of step {self.state.global_step} ({why}); those before it are untouched, and the "
                    "run goes on", RuntimeWarning, stacklevel=2,
                )  # fmt: skip
        distributed.wait()

    def values(self) -> dict[str, Tensor]:
        """Everything that is learnt, by job and name."""
        return {
            f"{job.name}/{name}": value
            for job in self.jobs
            for name, value in [*self.kit[job.name].named_parameters(), *self.kit[job.name].named_buffers()]
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint)
        progress = checkpoints.progress_of(path)
        if progress["run"] != self.run:
            raise ConfigError(
                f"{path} belongs to another run (its data, model or versions differ from now): write another "
                "output.folder, or delete this one"
            )
        checkpoints.load_values(path, self.values())
        most = self.work.micro
        self.work.restore(progress)
        self.work.micro = min(self.work.micro, most)  # whoever was stopped for memory may go on with less
        self.health.stopped = progress["stopped"]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        held = checkpoints.progress_of(Path(checkpoint))["scheduler"]
        checkpoints.load_optimiser(Path(checkpoint), self.optimizer)
        self.lr_scheduler.load_state_dict({**self.lr_scheduler.state_dict(), **held})
        for group, lr in zip(self.optimizer.param_groups, held["_last_lr"], strict=True):
            group["lr"] = lr

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to do: what is drawn follows from the seed and the step."""

    def load_best(self) -> int | None:
        """Puts the best checkpoint's values back; the step they are of, or None where nothing was measured."""
        best = self.state.best_global_step
        if not best or best == self.state.global_step:
            return best
        path = self.folder / f"{checkpoints.PREFIX}{best}"
        if not path.exists():  # the disk was full when it was to be written
            warnings.warn(f"there is no {path}, the best by what was measured: the last values stay", stacklevel=2)
            return int(self.state.global_step)
        checkpoints.load_values(path, self.values())
        return best


class SaveWhenMeasured(TrainerCallback):  # type: ignore[misc]
    """A checkpoint with every evaluation, so that the best one is there."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_save = control.should_save or control.should_evaluate
        return control


def _settled(args: TrainingArguments, steps: int, jobs: int) -> None:
    """What Trainer has to leave to us, or be told."""
    faults = Faults(ConfigError, "TrainingArguments")
    if args.gradient_accumulation_steps != 1:
        faults.add("gradient_accumulation_steps: a step is cut by Loop(micro=...), write 1")
    if args.fp16 or args.bf16:
        faults.add("fp16, bf16: the base has its own dtype and adapters are float32, write False for both")
    faults.raise_if_any()
    args.max_steps = min(args.max_steps, steps) if args.max_steps > 0 else steps
    args.max_grad_norm = 1.0  # each job has its own; 0 would leave out our checks with it
    args.restore_callback_states_from_checkpoint = True  # how long early stopping has waited
    args.ddp_find_unused_parameters = jobs > 1  # a job may be done, or have no row in a process


@contextlib.contextmanager
def _config_as_found(kit: Kit) -> Iterator[None]:
    """Trainer switches the cache off in the model's config; every call of ours says so itself."""
    missing = object()
    before = kit.config.__dict__.get("use_cache", missing)
    try:
        yield
    finally:
        if before is missing:
            kit.config.__dict__.pop("use_cache", None)
        else:
            kit.config.use_cache = before
