"""Roles: what a policy, its reference, a reward and a value say of one batch, as adapters of one frozen base.

The rows of the batch are repeated once per role and run in one pass that stops before the output head, where each row
is put through the head of its own role; or one pass per role, where that is faster. Both go through the same code, and
give the same values up to rounding. For scoring alone: no gradient, no dropout; `HeadLoss.log_probs` and
`scalar_head.scalars` have gradients. It knows no losses and no rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kitout import fast
from kitout.align.scalar_head import head_path, head_width, how_to_add, last_tokens
from kitout.base.eval_mode import eval_mode
from kitout.errors import ConfigError, RouteError, suggest
from kitout.evaluate.ask.token_likelihood import rows_per_chunk
from kitout.kit import Kit
from kitout.route import RouteEntry, check_entry
from kitout.runtime.build_adapter import check_known
from kitout.train.objectives.chunked_cross_entropy import at_least_float32
from kitout.train.objectives.lm_head_loss import replaced_forward
from kitout.train.objectives.objective import Batch

# Roles share a pass up to this many tokens of the batch, padding included. Four roles (three LoRAs of rank 8 at every
# linear and the base; d 384, 6 layers, fp32, one thread) in one pass took 0.66 of one pass each at 32 tokens, 0.80 at
# 64, 0.84 at 128, 0.90 at 192, 0.94 at 256 and 1.17 at 512: larger activations leave the processor's cache.
JOINT_TOKENS = 192
PROBE_SPREAD = 1000.0  # of the numbers in the place of logits: large enough that a soft cap or scale after them shows

Answer = Literal["tokens", "last", "all"]
How = Literal["auto", "joint", "separate"]

_changes_logits: WeakSet[nn.Module] = WeakSet()  # models with something after their head


def roles(
    kit: Kit, batch: Batch, wanted: Mapping[RouteEntry, Answer], how: How = "auto", *, temperature: float = 1.0
) -> dict[RouteEntry, Tensor]:  # fmt: skip
    """What each role says of the batch: `roles(kit, batch, {"policy": "tokens", None: "tokens", "taste": "last"})`.

    batch: of a causal language model, padded on either side, one example per row; inputs `input_ids` [B, T] and
    `attention_mask`, targets `positions` [N], flat in [B * T], which predict `labels` [N]. wanted: by adapter (or None
    for the base, a Stack, a Mix, Only) what it is asked:

    - "tokens": the log-probability of each label, [N], of logits divided by `temperature`;
    - "last": the scalar at each row's last real token, [B];
    - "all": the scalar at each of the positions, [N].

    Values are float32 (float64 for a float64 base), in the batch's own order: virtual tokens of a prefix or prompt
    shift nothing. how: "joint" is one pass for all roles, "separate" one per role, "auto" whichever is faster. Adapters
    that cannot differ by row run separately under "auto" and are a RouteError under "joint".

    Without gradients, in eval mode; modes and random state are restored. A scalar head must be in the place of the
    output head (`scalar_head`); "tokens" needs one of the vocabulary's width. Raises ConfigError, RouteError,
    UnknownAdapter.
    """
    path = head_path(kit)
    _check_wanted(kit, wanted, how)
    rows = _Rows.of(batch)
    is_joint = how == "joint" or (how == "auto" and fast.enabled() and rows.num_tokens <= JOINT_TOKENS)
    with eval_mode(kit.base, kit), kit.state.active.lock:
        if is_joint and len(wanted) > 1:
            try:
                return _run(kit, path, wanted, rows, temperature)
            except RouteError:  # what these adapters train cannot differ by row
                if how == "joint":
                    raise
        return {
            role: value
            for one in wanted.items()
            for role, value in _run(kit, path, dict([one]), rows, temperature).items()
        }


def _check_wanted(kit: Kit, wanted: Mapping[RouteEntry, Answer], how: How) -> None:
    kit.state.check_unmerged("roles(...)")
    if not wanted:
        raise ConfigError('roles: none asked: write {"policy": "tokens", None: "tokens"}')
    if how not in get_args(How):
        raise ConfigError(f"how={how!r}: {suggest(str(how), get_args(How))}")
    for role, answer in wanted.items():
        check_known(kit.state, check_entry(role))
        if answer not in get_args(Answer):
            raise ConfigError(f"{role!r} is asked for {answer!r}: {suggest(str(answer), get_args(Answer))}")
        width = head_width(kit, role)
        if answer == "tokens" and width is not None:
            raise RouteError(
                f"{role!r} is asked for 'tokens' and its head gives {width} {'value' if width == 1 else 'values'} per "
                "position, no logits of the vocabulary: ask it for 'last' or 'all', or the adapter of the policy"
            )
        if answer != "tokens" and width != 1:
            raise RouteError(
                f"{role!r} is asked for {answer!r} and has no scalar head: ask it for 'tokens', or {how_to_add(kit)}"
            )


@dataclass(frozen=True)
class _Rows:
    """A batch with its text at the left edge, where every model and every prefix counts positions alike."""

    inputs: dict[str, Any]
    """What the model is called with, once per role."""
    shape: tuple[int, int]
    """[B, T] without columns of padding alone."""
    positions: Tensor
    """[N]: those that predict a target, flat in this shape."""
    labels: Tensor
    """[N]: the targets."""
    last: Tensor
    """[B]: each row's last real token, flat in this shape."""

    @property
    def num_tokens(self) -> int:
        return self.shape[0] * self.shape[1]

    @classmethod
    def of(cls, batch: Batch) -> _Rows:
        inputs = dict(batch.inputs)
        if "position_ids" in inputs or len(inputs["input_ids"]) != batch.num_examples:
            raise ConfigError("roles takes one example per row: this batch is packed, so write train.packing=false")
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else (mask != 0).long()
        order = (mask == 0).long().argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.shape == ids.shape:
                inputs[name] = value.gather(1, order)
        inputs |= {"attention_mask": mask.gather(1, order), "use_cache": False}
        rows, columns = batch.targets["positions"] // ids.shape[1], batch.targets["positions"] % ids.shape[1]
        columns = (mask.cumsum(1) - 1)[rows, columns]
        starts = torch.arange(len(ids), device=ids.device) * order.shape[1]
        last = starts + last_tokens(inputs["attention_mask"])
        shape = (order.shape[0], order.shape[1])
        return cls(inputs, shape, starts[rows] + columns, batch.targets["labels"], last)

    def repeated(self, number: int) -> dict[str, Any]:
        """The inputs with all rows so many times, one after the other."""
        if number == 1:
            return self.inputs
        return {
            name: torch.cat([value] * number)
            if isinstance(value, Tensor) and value.ndim and len(value) == self.shape[0]
            else value
            for name, value in self.inputs.items()
        }


def _run(
    kit: Kit, path: str, wanted: Mapping[RouteEntry, Answer], rows: _Rows, temperature: float
) -> dict[RouteEntry, Tensor]:  # fmt: skip
    """One pass for these roles: the answers are taken inside the head's forward."""
    head: Any = kit.base.get_submodule(path)
    run_head = head.forward
    answers: dict[RouteEntry, Tensor] = {}
    changes_logits = kit.base in _changes_logits
    stand_in = torch.linspace(-PROBE_SPREAD, PROBE_SPREAD, head.out_features).to(rows.labels.device, kit.dtype)

    def forward(h: Tensor, *_: Any, **__: Any) -> Tensor:
        """Of [roles * B, T, d]; returns the logits where the model goes on with them, else a stand-in for them."""
        if h.shape[:2] != (len(wanted) * rows.shape[0], rows.shape[1]):
            raise RouteError(
                f"{path} is called with {list(h.shape[:-1])} positions, and the batch has {list(rows.shape)} for each "
                f"of {len(wanted)} roles: its rows cannot be assigned to roles here"
            )
        logits: list[Tensor] = []
        with_frozen_head: dict[RouteEntry, Tensor] = {}
        for (role, answer), own in zip(wanted.items(), h.chunk(len(wanted)), strict=True):
            own = own.reshape(-1, h.shape[-1])[rows.last if answer == "last" else rows.positions]
            compiled = kit.state.compile(role)
            if (
                answer == "tokens"
                and not changes_logits
                and all(hook.module is not head for hook, _ in compiled.programs)
            ):
                with_frozen_head[role] = own
                continue
            with kit.state.active.restored(compiled):
                if answer != "tokens":
                    answers[role] = at_least_float32(run_head(own[None])[0, :, 0])
                elif changes_logits:
                    logits.append(run_head(own[None]))
                else:
                    answers[role] = _log_probs(run_head, own, rows.labels, head.out_features, temperature)
        if with_frozen_head:  # in one product: of few rows it takes little longer than for one role
            count = len(with_frozen_head)
            with kit.state.active.restored(kit.state.compile(None)):
                found = _log_probs(
                    run_head,
                    torch.cat([*with_frozen_head.values()]),
                    rows.labels.repeat(count),
                    head.out_features,
                    temperature,
                )
            answers.update(zip(with_frozen_head, found.reshape(count, len(rows.labels)), strict=True))
        return torch.cat(logits, 1) if logits else stand_in[None, None].to(h.dtype)

    entries: Sequence[RouteEntry] = list(wanted)
    by_row = tuple(role for role in entries for _ in range(rows.shape[0]))
    with kit.use(entries[0] if len(entries) == 1 else by_row), replaced_forward(head, forward):
        logits = kit(**rows.repeated(len(entries))).logits
    scored = [role for role in entries if wanted[role] == "tokens"]
    if scored and changes_logits:
        for role, own in zip(scored, logits.reshape(len(scored), len(rows.labels), logits.shape[-1]), strict=True):
            answers[role] = _of_labels(own, rows.labels, temperature)
    elif scored and not torch.equal(logits[0, 0].to(kit.dtype), stand_in):
        _changes_logits.add(kit.base)
        return _run(kit, path, wanted, rows, temperature)
    return {role: answers[role] for role in entries}


def _log_probs(
    run_head: Callable[[Tensor], Tensor], h_Nd: Tensor, labels_N: Tensor, vocabulary: int, temperature: float
) -> Tensor:  # fmt: skip
    """Of the labels, a few rows of logits at a time, [N]."""
    size = rows_per_chunk(vocabulary)
    chunks = [
        _of_labels(run_head(h[None])[0], labels, temperature)
        for h, labels in zip(h_Nd.split(size), labels_N.split(size), strict=True)
    ]
    return torch.cat(chunks)


def _of_labels(logits_NV: Tensor, labels_N: Tensor, temperature: float) -> Tensor:
    return -F.cross_entropy(at_least_float32(logits_NV) / temperature, labels_N, reduction="none")
