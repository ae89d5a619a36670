"""How many tokens of a text the model reads under the active adapters: the one place that decides it.

What truncates, generates, scores labels or warns asks here. Virtual tokens before the text take positions too. Where
no position table says how many there are, the model is run once on a text as long as what is wanted. It knows kits,
and nothing of tokenizers, files or configs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import nn

from kitout.base.eval_mode import eval_mode
from kitout.base.token_limit import (
    MAX_OFFSET,
    long_batch,
    longest_that_runs,
    num_positions,
    runs,
    token_towers,
    trained_length,
)
from kitout.errors import ConfigError
from kitout.kit import Kit
from kitout.route import Route, adapter_names

Part = Literal["text", "target"]
DEFAULT_WINDOW = 2048  # tokens, where neither config nor tokenizer names a length; lm-eval's
UNLIMITED = 10**29  # transformers writes 1e30 for a tokenizer without a length
# By model, part and virtual tokens: the longest text that ran, and the shortest that did not.
_TRIED: WeakKeyDictionary[nn.Module, dict[tuple[Part, int], tuple[int, int | None]]] = WeakKeyDictionary()


def max_tokens(kit: Kit, wanted: int, part: Part = "text") -> int:
    """Tokens of one text up to `wanted` that the model reads with its active adapters. part: "target" of a decoder that
    reads an encoder. 0 where the model runs on no text at all, which is not for its length.
    """
    table, num_virtual = position_table(kit, part), num_virtual_tokens(kit, part)
    if table is not None:
        return min(wanted, max(0, table - num_virtual))
    trained = trained_length(kit.base)
    if trained is not None and wanted + num_virtual + MAX_OFFSET <= trained:
        return wanted
    known = _TRIED.setdefault(kit.base, {})
    longest, too_long = known.get((part, num_virtual), (0, None))
    if wanted <= longest or (too_long is not None and longest == too_long - 1):
        return min(wanted, longest)

    def does_run(num_tokens: int) -> bool:
        lengths = (num_tokens, None) if part == "text" else (2, num_tokens)
        batch = long_batch(kit.base, *lengths)
        return batch is None or runs(kit, batch)

    with eval_mode(kit.base, kit):
        found = longest_that_runs(does_run, wanted, None if trained is None else trained - num_virtual)
    if found:
        known[part, num_virtual] = found, None if found == wanted else found + 1
    return found


def check_prompts(kit: Kit, prompts: Sequence[Sequence[int]], num_after: int = 0) -> None:
    """ConfigError where a prompt, with so many tokens behind it, is longer than the model reads."""
    longest = max(map(len, prompts), default=0) + num_after
    limit = max_tokens(kit, longest) if longest else 0
    if not limit or longest <= limit:
        return
    number = next(i for i, prompt in enumerate(prompts) if len(prompt) + num_after > limit)
    behind = f" and {num_after} tokens of an answer behind it" if num_after else ""
    num_virtual = num_virtual_tokens(kit)
    beside = f" beside {num_virtual} virtual ones" if num_virtual else ""
    raise ConfigError(
        f"prompt number {number} has {len(prompts[number]):,} tokens{behind}, and the model reads {limit:,}{beside}: "
        f"shorten it by {len(prompts[number]) + num_after - limit:,}"
    )


def position_table(kit: Kit, part: Part = "text") -> int | None:
    """Positions of the table that the text's tower looks up; None where it has none."""
    tower = token_towers(kit.survey)[part == "target"]
    return None if tower is None else num_positions(kit.survey.model, tower)


def has_virtual_tokens(kit: Kit) -> bool:
    """Whether a prompt or prefix is active."""
    names = kit.state.names_with_parts(adapter_names(kit.active))
    return any(site.port in ("tokens", "kv") for name in names for site in kit[name].sites)


def window_tokens(kit: Kit, tokenizer: Any, routes: Sequence[Route] | None, wanted: int) -> int:
    """Tokens, up to `wanted`, that the model reads at once under every one of these routes. None: as it is now.

    What the model was trained on, by its config, else by its tokenizer, else 2048 (lm-eval's order), less what virtual
    tokens take where its positions end. One number for all, so that base and adapters are asked the same.
    """
    own = trained_length(kit.base)
    if own is None:
        own = tokenizer.model_max_length if tokenizer.model_max_length < UNLIMITED else DEFAULT_WINDOW
    limit = min(wanted, own)
    for route in (None,) if routes is None else routes:
        with nullcontext() if routes is None else kit.use(route):
            limit = min(limit, max_tokens(kit, limit) or limit)
    return limit


def num_virtual_tokens(kit: Kit, part: Part = "text") -> int:
    """Positions that prompts and prefixes of the active route take before a text, of the row that has most."""
    tower = token_towers(kit.survey)[part == "target"]
    if tower is None:
        return 0

    def of_entry(entry: Route) -> int:
        adapters = [kit[name] for name in kit.state.names_with_parts(adapter_names(entry))]
        parts = [p for a in adapters for p in (a.prompts.get(tower.path), a.prefixes_at(tower.path, "kv.self")) if p]
        return sum(max(part.delta.num_tokens for part in each) for each in parts)

    route = kit.active
    return max(map(of_entry, route), default=0) if isinstance(route, tuple) else of_entry(route)
