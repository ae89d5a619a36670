"""What all rows of a forward begin with, an instruction or a system prompt, runs once, in the same call as the rests.

The call has one row: the beginning, then what follows it in each row, every rest padded on the right to one length.
Where rows have adapters of their own, it has one row for each, of as many rests, so that none sees another's beginning.
Modules that see one position at a time cannot tell. Attention is ours meanwhile: a rest sees the beginning and itself.
Values and gradients are those of whole rows up to rounding, and `can_share` compares both kinds on the model at hand:
whatever else mixes positions shows there. It knows rows, heads and positions, and no loss and no adapter's method.
The idea of prompts that run once in training: Prefix Grouper, arXiv 2506.05433.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kitout import fast
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.data.padding import pad
from kitout.evaluate.ask.text_limit import has_virtual_tokens, num_virtual_tokens
from kitout.kit import Kit
from kitout.route import RouteEntry, adapter_names
from kitout.runtime.virtual_tokens.attention_call import take_keys_without_mask
from kitout.train.objectives.answer_rows import collate_rows
from kitout.train.objectives.lm_head_loss import TOLERANCE, HeadLoss
from kitout.train.objectives.objective import Batch
from kitout.train.trunk.kept_inputs import is_within_trunk

MOST_OF_TOKENS = 0.9  # of whole rows, padding included: where sharing leaves more, rows run whole
ATTENTION = "kitout_shared_beginning"  # its name among transformers' implementations
PLAIN = ("eager", "sdpa")  # the implementations in whose place it may run
FULL = "full_attention"  # of a layer that sees all positions before
PROBE_BEGINNING, PROBE_RESTS = 5, (3, 6, 4)  # tokens


@dataclass(frozen=True)
class SharedBeginning:
    """The rows of one batch as a single one."""

    inputs: dict[str, Any]
    """What the model is called with: [G, S + B * A]."""
    positions: Tensor
    """[N]: those that predict a target, row by row, in the flattened [G * (S + B * A)]."""
    num_shared: int
    """S, tokens of each beginning."""
    rests: tuple[int, int]
    """B and A, the rests of each beginning and their length."""

    @classmethod
    def of(
        cls, rows: Sequence[EncodedExample], device: torch.device, groups: int = 1, first_position: int = 0
    ) -> SharedBeginning | None:
        """What all begin with in front of their first target, once; None where that saves too little.

        groups: that have a beginning each, of as many neighboring rows; as long as the shortest of them.
        first_position: behind a prefix, as many as it has keys.

        What stands behind a row's last target is left out: nothing that is trained on sees it.
        """
        number = len(rows) // groups
        if not fast.enabled() or number < 2:
            return None
        targets = [[t for t, label in enumerate(row.labels) if t and label != IGNORE_INDEX] for row in rows]
        if not all(targets):
            return None
        by_group = [rows[first : first + number] for first in range(0, len(rows), number)]
        start = min(*map(_common_length, by_group), *(of_row[0] - 1 for of_row in targets))
        rests = [row.input_ids[start : of_row[-1]] for row, of_row in zip(rows, targets, strict=True)]
        width = max(map(len, rests))
        length = start + number * width  # of a group
        if not start or groups * length > MOST_OF_TOKENS * len(rows) * max(row.length for row in rows):
            return None
        ids, _ = pad(rests, 0, "right", device)
        beginnings = torch.tensor([of_group[0].input_ids[:start] for of_group in by_group], device=device)
        counted = torch.arange(start + width, device=device) + first_position
        positions = [
            r // number * length + r % number * width + t - 1 for r, of_row in enumerate(targets) for t in of_row
        ]
        inputs = {
            "input_ids": torch.cat((beginnings, ids.view(groups, number * width)), 1),
            "position_ids": torch.cat((counted[:start], counted[start:].repeat(number))).expand(groups, -1),
            "use_cache": False,
        }
        return cls(inputs, torch.tensor(positions, dtype=torch.long, device=device), start, (number, width))

    def run(self, model: Any, kit: Kit) -> Any:
        """The model's output, from one call."""
        base: Any = kit.base
        route = kit.active
        token = _layout.set(self)
        try:
            by_group = kit.use(route[:: self.rests[0]]) if isinstance(route, tuple) else nullcontext()
            with _attention_of(base.config), by_group:
                return model(**self.inputs)
        finally:
            _layout.reset(token)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, fused: bool) -> Tensor:
        """[G, S + B * A, H, d] from queries [G, H, S + B * A, d], keys and values [G, K, P + S + B * A, d].

        P: keys of a prefix, which all see.
        """
        rows, start, (number, width) = len(q), self.num_shared, self.rests
        heads, groups = k.shape[1], q.shape[1] // k.shape[1]
        prefix = k.shape[2] - q.shape[2]
        common = prefix + start  # keys that every rest sees
        ranges = torch.arange(start + width, device=q.device)
        sees = F.pad(ranges[:, None] >= ranges, (prefix, 0), value=True)
        first = _attend(
            q[:, :, :start].reshape(rows, heads, groups, start, -1), k[:, :, :common], v[:, :, :common],
            sees[:start, :common], scaling, fused,
        )  # fmt: skip
        keys, values = (
            torch.cat(
                (
                    each[:, None, :, :common].expand(-1, number, -1, -1, -1).flatten(0, 1),
                    each[:, :, common:].reshape(rows, heads, number, width, -1).transpose(1, 2).flatten(0, 1),
                ),
                2,
            )
            for each in (k, v)
        )
        queries = q[:, :, start:].reshape(rows, heads, groups, number, width, -1).permute(0, 3, 1, 2, 4, 5)
        rest = _attend(queries.flatten(0, 1), keys, values, sees[start:], scaling, fused)
        return torch.cat((first, rest.reshape(rows, number * width, *rest.shape[2:])), 1)


@dataclass(frozen=True)
class BatchWithBeginning(Batch):
    """Rows of texts, also as what they begin with and what follows it."""

    rows: Sequence[EncodedExample] = ()
    """The texts of a training step whose beginnings may run once."""


_layout: ContextVar[SharedBeginning | None] = ContextVar("shared_beginning", default=None)
_is_fused: ContextVar[bool] = ContextVar("shared_beginning_is_fused", default=False)


@torch.no_grad()
def can_share(kit: Kit, head: HeadLoss, items: Sequence[EncodedExample]) -> bool:
    """Whether rows of this model and its active adapters get the same where their beginning runs once.

    Not behind prompts, and not with attention of another kind. items: whose ids it is tried on.
    """
    prefix = _prefix_length(kit)
    if not fast.enabled() or prefix is None or not _sees_all_before(kit.base):
        return False
    ids = [token for item in items for token in item.input_ids]
    ids = ids * -(-(PROBE_BEGINNING + sum(PROBE_RESTS)) // len(ids))
    rows = []
    for number, rest in enumerate(PROBE_RESTS):
        text = (*ids[:PROBE_BEGINNING], *ids[PROBE_BEGINNING + number :][:rest])
        labels = tuple(token if t > PROBE_BEGINNING else IGNORE_INDEX for t, token in enumerate(text))
        rows.append(EncodedExample(text, labels))
    batch, shared = collate_rows(rows, kit.device), SharedBeginning.of(rows, kit.device, first_position=prefix)
    if shared is None:
        return False
    labels_N = batch.targets["labels"]
    weights = torch.full((len(labels_N),), 1.0 / len(labels_N), device=kit.device)
    expected = head(lambda: kit(**batch.inputs), batch.targets["positions"], labels_N, weights)[1]
    try:
        found = head(lambda: shared.run(kit, kit), shared.positions, labels_N, weights)[1]
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):  # another kind of model
        return False
    tolerance = TOLERANCE.get(kit.dtype, 1e-4) * (1 + expected.abs().mean().item())
    return (found - expected).abs().mean().item() <= tolerance


def shared_of(kit: Kit, batch: Batch) -> SharedBeginning | None:
    """What of a batch may run once: nothing where the adapters of rows differ in how many they have, behind prompts
    or the prefixes of several adapters, under dropout, which differs from row to row, where blocks run again in
    backward, and behind a frozen trunk with what is kept of whole rows.
    """
    if not isinstance(batch, BatchWithBeginning) or kit.state.graphs is not None or is_within_trunk():
        return None
    drops = any(kit[name].training and kit[name].has_dropout for name in adapter_names(kit.active))
    prefix = _prefix_length(kit)
    if drops or prefix is None:
        return None
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = (module for module in kit.base.modules() if isinstance(module, GradientCheckpointingLayer))
    if any(block.gradient_checkpointing for block in blocks):
        return None
    groups = _groups_of(kit.active) if isinstance(kit.active, tuple) else 1
    return None if groups is None else SharedBeginning.of(batch.rows, kit.device, groups, prefix)


def _prefix_length(kit: Kit) -> int | None:
    """How many keys all rows have in front of them: 0, or those of one whole prefix. None: virtual tokens of another
    kind, or prefixes put together.
    """
    if not has_virtual_tokens(kit):
        return 0
    name = kit.active
    if not isinstance(name, str) or kit.state.names_with_parts([name]) != [name] or kit[name].strength != 1:
        return None
    roles = {site.role for site in kit[name].sites if site.port in ("tokens", "kv")}
    return num_virtual_tokens(kit) if roles == {"kv.self"} else None


def _groups_of(route: Sequence[RouteEntry]) -> int | None:
    """How many neighboring rows of one adapter there are, if all are of one number."""
    sizes = [len(list(same)) for _, same in groupby(route)]
    return len(sizes) if len(set(sizes)) == 1 else None


def _sees_all_before(base: Any) -> bool:
    """Plain attention to every position before: a probe is too short for a window to show."""
    text = base.config.get_text_config()
    if "position_ids" not in inspect.signature(base.forward).parameters or text._attn_implementation not in PLAIN:
        return False
    settings = text.to_dict()
    has_window = settings.get("sliding_window") is not None or settings.get("attention_chunk_size") is not None
    return not has_window and set(settings.get("layer_types") or [FULL]) == {FULL}


def _common_length(rows: Sequence[EncodedExample]) -> int:
    first, last = min(row.input_ids for row in rows), max(row.input_ids for row in rows)
    return next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


@contextmanager
def _attention_of(config: Any) -> Iterator[None]:
    """Attention is ours meanwhile, in every stack of the model."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)
    take_keys_without_mask(ATTENTION)
    before = config._attn_implementation
    _is_fused.set(before == "sdpa")
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def _attention(
    _module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None,
    dropout: float = 0.0, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """As transformers calls it. ValueError for what it does not do: the rows then run whole."""
    layout = _layout.get()
    others = [name for name in ("softcap", "sliding_window", "s_aux", "position_bias") if more.get(name) is not None]
    if layout is None or others or mask is not None or dropout or q.shape[2] != layout.inputs["input_ids"].shape[1]:
        raise ValueError(f"attention over a shared beginning does not know {', '.join(others) or 'this call'}")
    return layout.attend(q, k, v, q.shape[-1] ** -0.5 if scaling is None else scaling, _is_fused.get()), None


def _attend(q: Tensor, k: Tensor, v: Tensor, sees: Tensor, scaling: float, fused: bool) -> Tensor:
    """[B, T, H, d] from queries [B, K, G, T, d] and keys and values [B, K, L, d]; sees [T, L]."""
    rows, heads, groups, length, d = q.shape
    if fused:
        mixed = F.scaled_dot_product_attention(
            q.reshape(rows, heads * groups, length, d), k, v, sees, scale=scaling, enable_gqa=groups > 1
        )
        return mixed.transpose(1, 2)
    scores = (q.reshape(rows, heads, groups * length, d) * scaling) @ k.transpose(2, 3)
    scores = scores.view(rows, heads, groups, length, -1).masked_fill(~sees, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    mixed = weights.view(rows, heads, groups * length, -1) @ v
    return mixed.view(rows, heads * groups, length, d).transpose(1, 2)
