"""Averages of outputs: every row of a call runs once under each entry, and the model's outputs become one.

The copies of a call lie one after the other in its batch, which is how rows of a route are repeated
(`modules/rows.py`), so that they share one forward and, inside `generate`, one cache. What `generate` sees has its own
number of rows. It knows calls and outputs, and nothing of adapters or modules.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kitout.device_constants import constant
from kitout.errors import RouteError
from kitout.route import Average

SEVERAL_SEQUENCES = ("num_beams", "num_beam_groups")
OTHER_DECODING = ("assistant_model", "prompt_lookup_num_tokens", "custom_generate", "penalty_alpha", "dola_layers")
MULTI_LABEL = "multi_label_classification"


def repeat_call(
    average: Average, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call of `batch` rows with every row as often as the average has entries."""
    if kwargs.get("labels") is not None:
        raise RouteError(
            "an Average has no loss: each entry would have one of its own. Call without labels, and take the loss of "
            "the averaged logits"
        )
    n = len(average.parts)
    new = {name: _repeat(value, n, batch, name) for name, value in kwargs.items()}
    if (states := kwargs.get("encoder_outputs")) is not None:
        new["encoder_outputs"] = _repeat_states(states, n, batch)
    return tuple(_repeat(value, n, batch) for value in args), new


def _repeat(value: Any, n: int, batch: int, name: str = "") -> Any:
    """n copies, one after the other. What is one for all rows, or has no rows (positions of a cache), stays."""
    if type(value) is dict:  # a mask for each kind of attention, as generate makes them for a static cache
        return {key: _repeat(each, n, batch, name) for key, each in value.items()}
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    if name == "position_ids" and value.ndim == 3:  # [axes, batch, tokens]
        return value if value.shape[1] != batch else torch.cat([value] * n, 1)
    return value if value.shape[0] == 1 != batch else torch.cat([value] * n)


def _repeat_states(states: Any, n: int, batch: int) -> Any:
    """What an encoder gave: for the rows of the call, or for all copies already (inside `generate`)."""
    if len(states[0]) == n * batch:
        return states
    if isinstance(states, Mapping):
        return type(states)(**{name: _repeat(value, n, batch) for name, value in states.items()})
    return tuple(_repeat(value, n, batch) for value in states)


def average_output(average: Average, output: Any, config: Any) -> Any:
    """The output with the logits of all copies averaged; without logits, whatever values it has.

    Hidden states, attentions and caches of a model's output stay those of the copies, one after the other.
    """
    if isinstance(output, Tensor):
        return _average(average, output, config)
    if isinstance(output, tuple):
        return (_average(average, output[0], config), *output[1:])
    names = [name for name in output if name.endswith("logits")]
    if not names and average.of == "logits":
        names = [name for name in ("last_hidden_state", "pooler_output") if isinstance(output.get(name), Tensor)]
    if not names:
        raise RouteError(f"Average(of={average.of!r}): this model's output has only {', '.join(output)}")
    for name in names:
        output[name] = _average(average, output[name], config)
    return output


def _average(average: Average, values: Tensor, config: Any) -> Tensor:
    copies = values.unflatten(0, (len(average.parts), -1))
    weights = [weight for _, weight in average.parts]
    if average.of == "logits":
        return torch.stack([weight * copy for weight, copy in zip(weights, copies, strict=True)]).sum(0)
    if values.shape[-1] == 1:
        raise RouteError("this output has one value per row, which is no probability: Average(..., of='logits')")
    dtype = torch.promote_types(values.dtype, torch.float32)
    logs = constant(tuple(weights), values.device, dtype).log().view(-1, *[1] * values.ndim)
    copies = copies.to(dtype)
    if getattr(config, "problem_type", None) == MULTI_LABEL:  # each value has a probability of its own
        yes = torch.logsumexp(torch.nn.functional.logsigmoid(copies) + logs, 0)
        no = torch.logsumexp(torch.nn.functional.logsigmoid(-copies) + logs, 0)
        return (yes - no).to(values.dtype)
    return torch.logsumexp(copies.log_softmax(-1) + logs, 0).to(values.dtype)


def check_generation(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """RouteError where `generate` would keep several sequences per row, or not run the model row by row."""
    given = [value for value in args if type(value).__name__ == "GenerationConfig"]
    configs = (kwargs.get("generation_config"), *given, getattr(model, "generation_config", None))
    config = next((value for value in configs if value is not None), None)
    for name in (*SEVERAL_SEQUENCES, *OTHER_DECODING):
        value = kwargs.get(name, getattr(config, name, None))
        if value and not (name in SEVERAL_SEQUENCES and value == 1):
            raise RouteError(
                f"generate({name}={value!r}) under an Average: the copies of a row would follow sequences of their "
                "own; decode greedily, or sample (do_sample=True)"
            )


def encode_copies(
    average: Average, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `generate` with what the encoder gives for all copies of its rows.

    `generate` runs an encoder by itself and once per row. It takes states that are given, and repeats those of a row
    for several sequences, after which copies still lie one after the other.
    """
    if not getattr(model.config, "is_encoder_decoder", False) or kwargs.get("encoder_outputs") is not None:
        return args, kwargs
    inputs, *rest = args or (kwargs.get("inputs"),)
    encoder = model.get_encoder()
    main = getattr(encoder, "main_input_name", "input_ids")
    inputs = kwargs.get(main) if inputs is None else inputs
    if not isinstance(inputs, Tensor):
        raise RouteError(f"generate() under an Average needs its {main}: it runs the encoder once per entry")
    n, batch = len(average.parts), inputs.shape[0]
    mask = kwargs.get("attention_mask")
    if (
        mask is None
        and main == "input_ids"
        and (pad := getattr(model.generation_config, "pad_token_id", None)) is not None
    ):
        mask = (inputs != pad).long()  # as generate makes it
    own = set(inspect.signature(encoder.forward).parameters)  # boxes, pixels, ...: what generate would hand to it
    others = {k: v for k, v in kwargs.items() if k in own and k not in ("inputs", main, "attention_mask", "use_cache")}
    call = {name: _repeat(value, n, batch) for name, value in others.items()}
    call[main] = _repeat(inputs, n, batch)
    if mask is not None:
        call["attention_mask"] = _repeat(mask, n, batch)
    new = {name: value for name, value in kwargs.items() if name not in ("inputs", main)}
    if mask is not None:
        new["attention_mask"] = mask
    new["encoder_outputs"] = encoder(**call, return_dict=True)
    return (inputs, *rest), new
