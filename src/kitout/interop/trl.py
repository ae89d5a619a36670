"""TRL's trainers that build their own reference model: the same trainers with the reference a kit has already.

TRL loads a second copy of the base by name unless the model is a PeftModel, and GRPOTrainer and RLOOTrainer take no
`ref_model`. Here a kit's reference is `kitout.reference(kit)`; with another model, or with beta 0, they are TRL's own.
SFTTrainer, RewardTrainer, DPOTrainer and KTOTrainer take a kit as it is. Written for TRL 1.16.
"""

from __future__ import annotations

from typing import Any

from kitout.errors import ConfigError, Errors
from kitout.install_hint import suggest_install
from kitout.interop.reference import Reference, reference
from kitout.kit import Kit

try:
    import trl
    from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model
except ImportError as error:
    raise ConfigError(f"kitout.interop.trl needs TRL: {error}\n  {suggest_install('trl>=1.16')}") from error


class _SharedBase:
    """The part that both trainers share: TRL's set-up without a reference, then the kit's."""

    config_class: Any

    def __init__(
        self, model: Any, reward_funcs: Any, args: Any = None, *rest: Any, ref_model: Reference | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        if args is None:
            name = model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", ""))
            args = self.config_class(f"{name.split('/')[-1]}-{self.config_class.__name__.removesuffix('Config')}")
        beta = args.beta
        if not isinstance(model, Kit) or beta == 0.0:
            if ref_model is not None:
                raise ConfigError("ref_model: only a kit with beta > 0 has use for a reference")
            super().__init__(model, reward_funcs, args, *rest, **options)  # type: ignore[call-arg]
            return
        _check(args)
        args.beta = 0.0  # with which TRL loads no reference
        try:
            super().__init__(model, reward_funcs, args, *rest, **options)  # type: ignore[call-arg]
        finally:
            args.beta = beta
        self.beta = beta
        shared: Any = reference(model) if ref_model is None else ref_model
        if args.disable_dropout:
            disable_dropout_in_model(shared)
        trainer: Any = self
        add_fused_lm_head(shared, temperature=trainer.temperature)
        self.ref_model = trainer.accelerator.prepare_model(shared, evaluation_mode=True)


def _check(args: Any) -> None:
    errors = Errors(ConfigError, "a kit's reference is its own frozen base")
    if args.sync_ref_model:
        errors.add("sync_ref_model=True would copy trained values into it: write False")
    if getattr(args, "cast_lm_head_to_fp32", False):  # RLOOConfig has no such setting
        errors.add("cast_lm_head_to_fp32=True would edit its output head: load the model in float32, and write False")
    errors.raise_if_any()


class GRPOTrainer(_SharedBase, trl.GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPOTrainer. With a kit and beta > 0 the reference is `ref_model`, by default `kitout.reference(model)`."""

    config_class = trl.GRPOConfig


class RLOOTrainer(_SharedBase, trl.RLOOTrainer):  # type: ignore[misc]
    """TRL's RLOOTrainer. With a kit and beta > 0 the reference is `ref_model`, by default `kitout.reference(model)`."""

    config_class = trl.RLOOConfig
