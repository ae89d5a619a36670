"""The settings of transformers.Trainer that a run's config comes to: steps, evaluations, checkpoints, trackers.

It knows a config and a folder, and nothing of what is trained.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from kitout.errors import ConfigError, Errors
from kitout.train.config.schema import RunConfig
from kitout.train.run_folder import RunFolder

MAX_LOGS = 2000
NUM_EVALUATIONS, NUM_CHECKPOINTS = 5, 10  # of a run, by default


def training_arguments(config: RunConfig, folder: RunFolder, num_steps: int, has_validation: bool) -> Any:
    from transformers import TrainingArguments

    eval_steps = config.evaluate.steps
    if eval_steps is None:
        eval_steps = math.ceil(num_steps / NUM_EVALUATIONS)
    evaluates = has_validation and eval_steps > 0
    best_metric = config.evaluate.best_metric or "loss"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return TrainingArguments(
            output_dir=str(folder.checkpoints),
            max_steps=num_steps,
            per_device_train_batch_size=1,
            report_to=list(config.output.report_to) or "none",
            logging_steps=math.ceil(num_steps / MAX_LOGS),
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            log_level="error",
            eval_strategy="steps" if evaluates else "no",
            eval_steps=eval_steps if evaluates else None,
            save_strategy="steps",
            save_steps=config.train.save_steps or math.ceil(num_steps / NUM_CHECKPOINTS),
            metric_for_best_model=f"eval_{best_metric}" if evaluates else None,
            greater_is_better=best_metric not in ("loss", "perplexity", "mae", "rmse") if evaluates else None,
            remove_unused_columns=False,
            label_names=[],
            use_cpu=not torch.cuda.is_available() or config.model.device == "cpu",
            activation_checkpointing=config.train.activation_checkpointing,
            seed=config.train.seed,
            run_name=folder.path.name,
            ddp_find_unused_parameters=len(config.per_job()) > 1,
        )


def adjust_arguments(args: Any, num_steps: int, num_jobs: int) -> None:
    """Sets what the loop relies on; ConfigError for what it does itself."""
    errors = Errors(ConfigError, "TrainingArguments")
    if args.gradient_accumulation_steps != 1:
        errors.add(
            "gradient_accumulation_steps: JobTrainer(micro_batch_size=...) cuts a step into micro-batches, write 1"
        )
    if args.fp16 or args.bf16:
        errors.add("fp16, bf16: the base has its own dtype and adapters are float32, write False for both")
    errors.raise_if_any()
    args.max_steps = min(args.max_steps, num_steps) if args.max_steps > 0 else num_steps
    args.max_grad_norm = 1.0  # each job has its own; with 0 Trainer would skip our health checks too
    args.restore_callback_states_from_checkpoint = True  # the patience that early stopping has used up
    args.ddp_find_unused_parameters = num_jobs > 1  # a job may be done, or have no row in a process
