"""What settings of a stage are called elsewhere (TRL, OpenRLHF, verl), and what to write here.

Besides the table of `kitout train`, which holds for every stage too, and before it. It knows names, and no type of any
setting.
"""

from __future__ import annotations

from kitout.align.config import losses
from kitout.train.config.foreign_keys import advice_by_key

ELSEWHERE = losses.ELSEWHERE | {
    "kind": "algorithm trainer trainer_type rl rlhf_type rlhf pref_loss preference_loss kind objective task task_type "
    "problem_type",
    "stages": "stage steps_of_run pipeline stages",
    "from": "ref_model reference_model ref_model_path init_from sft_model sft_model_path adapter_name_or_path "
    "lora_model_dir",
    "reward": "reward_funcs reward_func reward_functions reward_model reward_model_path reward_weights rewards",
    "rollout.samples": "samples num_generations n_samples_per_prompt num_return_sequences rloo_k group_size k n",
    "rollout.prompts": "generation_batch_size rollout_batch_size steps_per_generation prompts_per_step",
    "rollout.max_new_tokens": "max_completion_length response_length max_response_length generate_max_len "
    "max_new_tokens",
    "rollout.temperature": "temperature",
    "rollout.top_p": "top_p",
    "rollout.top_k": "top_k",
    "method.dropout=0": "disable_dropout",
}  # fmt: skip
LEAVE_OUT = {
    "answers are sampled by the model's own generation": "use_vllm vllm_mode vllm_gpu_memory_utilization",
    "the reference is the stage that `from` names, or the base": "sync_ref_model ref_model_sync_steps "
    "ref_model_mixup_alpha",
    "the value adapter starts from the reward adapter": "value_model critic critic_model value_model_path",
    "a reference's log-probabilities are computed once and kept": "precompute_ref_log_probs",
}  # fmt: skip

ADVICE = advice_by_key(ELSEWHERE, LEAVE_OUT)
