"""What settings are called elsewhere (PEFT, the Trainer, TRL, Axolotl, LLaMA-Factory), and what to write here.

A config that holds one is an error that says what to write instead: names that mean nearly the same are not taken
silently. Keys are compared without case, hyphens and underscores. It knows names, and no type of any setting.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from types import MappingProxyType

# Keys of another verb's config: what to write for each.
OF_STAGES: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("kind", "stages", "loss", "rollout", "reward"), "stages are trained by `kitout align`")
)

# What to write -> what it is called elsewhere, or where it is written by mistake. Text behind a blank is for people.
ELSEWHERE_BY_SETTING = {
    "model.name": "model_name_or_path model_id model_path base_model base_model_name_or_path model_name checkpoint "
    "pretrained_model_name_or_path",
    "model.dtype": "torch_dtype precision compute_dtype",
    "model.dtype=bfloat16": "bf16 bfloat16",
    "model.dtype=float16": "fp16 float16",
    "model.quantization=nf4": "load_in_4bit bnb_4bit_quant_type quantization_bit",
    "model.quantization=int8": "load_in_8bit",
    "model.device": "device_map use_cpu no_cuda",
    "model.attention": "attn_implementation flash_attn flash_attention use_flash_attention_2",
    "method": "peft_type finetuning_type adapter adapter_type peft_config tuner_type train_type",
    "method.rank": "r rank lora_r lora_rank adapter_rank",
    "method.alpha": "alpha lora_alpha",
    "method.dropout": "dropout lora_dropout",
    "method.targets": "targets target_modules lora_target lora_targets lora_target_modules lora_target_linear "
    "target_parameters",
    "method.layers": "layers layers_to_transform layers_pattern",
    "method.rslora": "use_rslora rslora",
    "method.dora": "use_dora peft_use_dora dora",
    "method.init": "init_lora_weights peft_init_lora_weights prompt_tuning_init",
    "method.length": "num_virtual_tokens prompt_length prefix_length num_tokens length",
    "method.width": "bottleneck_size bottleneck_dim adapter_dim adapter_size width",
    "method.encoder": "prefix_projection encoder_hidden_size",
    "method.rank (it may be by role: {attn.*: 8})": "rank_pattern",
    "method.alpha (it may be by role: {attn.*: 8})": "alpha_pattern",
    "data.train": "dataset datasets dataset_name dataset_path dataset_dir train_file train_files train_data data_path "
    "data_files train_dataset train_path",
    "data.validation": "val_size val_set_size validation_split validation_file eval_dataset eval_file eval_data dev "
    "val_data validation_size",
    "data.test": "test_size test_file test_dataset test_datasets test_split",
    "data.train.columns": "dataset_text_field text_column label_column text_field text_columns columns column_mapping "
    "field_instruction field_output prompt_column response_column",
    "data.train.format": "dataset_type chat_template_type dataset_format",
    "data.train.limit": "max_samples max_train_samples num_samples limit",
    "data.train.system_prompt": "system default_system system_message",
    "data.max_length": "max_seq_length max_seq_len sequence_len sequence_length cutoff_len model_max_length "
    "max_prompt_length seq_len",
    "data.train_on": "train_on_inputs train_on_prompt mask_prompt mask_history completion_only_loss "
    "assistant_only_loss train_on_responses_only",
    "data.labels": "label_names id2label label2id num_labels classes class_names",
    "data.bad_rows=skip": "skip_bad_rows ignore_errors",
    "data.image_size": "img_size crop_size resolution input_size",
    "data.streaming": "streaming iterable_dataset",
    "objective": "task task_type problem_type stage",
    "train.lr": "learning_rate lr base_lr",
    "train.epochs": "num_train_epochs num_epochs epochs epoch n_epochs max_epochs",
    "train.steps": "max_steps num_steps num_train_steps total_steps train_steps max_iters",
    "train.batch_size": "batch per_device_train_batch_size train_batch_size global_batch_size batch_size batchsize bs",
    "train.micro_batch_size": "micro_batch_size per_gpu_batch_size auto_find_batch_size",
    "train.batch_size (examples of a whole optimizer step; train.micro_batch_size is what one forward takes)":
    "gradient_accumulation_steps accumulation_steps grad_accum gradient_accumulation",
    "train.warmup_ratio (a fraction of the run)": "warmup_steps num_warmup_steps warmup",
    "train.lr_schedule": "lr_scheduler_type lr_scheduler scheduler lr_scheduler_kwargs scheduler_type",
    "train.weight_decay": "wd decay weight_decay",
    "train.max_grad_norm": "gradient_clipping grad_clip clip_grad_norm max_norm gradient_clip_val",
    "train.activation_checkpointing": "gradient_checkpointing use_gradient_checkpointing gradient_checkpointing_kwargs",
    "train.packing": "sample_packing packing use_packing pad_to_sequence_len",
    "train.loraplus_lr_ratio": "loraplus_lr_ratio loraplus_ratio lora_plus_ratio",
    "train.group_by_length": "group_by_length length_grouped",
    "train.early_stopping_patience": "early_stopping patience",
    "train.save_steps": "save_strategy saves_per_epoch save_every",
    "train.keep_checkpoints": "save_total_limit",
    "train.fsdp": "fsdp fsdp_config deepspeed",
    "train.from": "adapter_name_or_path lora_model_dir init_from",
    "train.seed": "random_seed random_state data_seed",
    "evaluate.steps": "eval_steps eval_strategy evaluation_strategy evals_per_epoch eval_freq do_eval",
    "evaluate.best_metric": "metric_for_best_model load_best_model_at_end",
    "evaluate.max_test_examples": "max_eval_samples max_test_samples max_predict_samples",
    "evaluate.max_new_tokens": "max_new_tokens generation_max_length max_tokens",
    "output.folder": "output_dir output out out_dir save_dir output_path run_name",
    "output.report_to": "wandb_project use_wandb wandb tensorboard logging_dir report_to",
}  # fmt: skip
LEAVE_OUT = {
    "the optimizer is AdamW": "optim optimizer adam_beta1 adam_beta2 adam_epsilon",
    "every step is in metrics.jsonl": "logging_steps logging_strategy log_every",
    "the same command resumes a run that was stopped": "resume_from_checkpoint auto_resume_from_checkpoints resume",
    "a run trains, evaluates and tests": "do_train do_predict",
    "a new head is trained and saved with its adapter": "modules_to_save additional_target",
    "the tokenizer's own chat template is used (data.chat_template_kwargs holds its arguments)":
    "template chat_template",
    "rows are padded to the longest of their batch": "pad_to_max_length padding padding_side",
    "no code of a model's folder is run": "trust_remote_code",
}  # fmt: skip


def fold_key(key: str) -> str:
    return re.sub(r"[-_ ]", "", key).lower()


def advice_by_key(by_setting: Mapping[str, str], leave_out: Mapping[str, str]) -> dict[str, str]:
    """Folded key -> what to say of it, from two tables as those above."""
    written = {fold_key(name): f"write {setting}" for setting, names in by_setting.items() for name in names.split()}
    return written | {
        fold_key(name): f"leave it out: {reason}" for reason, names in leave_out.items() for name in names.split()
    }


ADVICE = advice_by_key(ELSEWHERE_BY_SETTING, LEAVE_OUT)
_IN_ENTRY = re.compile(r"((?:jobs|stages)\.\d+\.)?(.*)", re.DOTALL)  # the entry of a list that a setting belongs to
_OF_THE_WHOLE = ("write model", "write output", "write stages", "leave")  # advice that belongs to no entry


def key_hint(location: str, own: Mapping[str, str] | None = None) -> str | None:
    """`train.learning_rate` -> "write train.lr", below the same job; None for a key that means nothing elsewhere.

    own: what the config adds to the table, or has in place of it.
    """
    entry, key = _IN_ENTRY.fullmatch(location).groups(default="")  # type: ignore[union-attr]  # it matches any text
    folded = fold_key(key.rpartition(".")[2][:80])
    advice = (own or {}).get(folded) or ADVICE.get(folded)
    if advice is None or advice.split(" ")[:2] == ["write", key]:
        return None
    only_of_jobs = ("write evaluate", "write objective") if entry.startswith("jobs") else ()
    is_of_entry = entry and not advice.startswith((*_OF_THE_WHOLE, *only_of_jobs))
    return advice.replace("write ", f"write {entry}", 1) if is_of_entry else advice


def method_hint(key: str, known: Container[str]) -> str | None:
    """The same for a setting of a method, which has the settings `known`."""
    advice = ADVICE.get(fold_key(key[:80]))
    target = re.match(r"write method\.(\w+)", advice or "")
    return advice if advice != "write method" and (target is None or target[1] in known) else None
