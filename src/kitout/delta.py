"""The Delta: a trained map at one site, y' = delta(x, y), on which everything else is built.

Routing, stacking, mixing, strength, merging, counting and saving are written once over `Delta` alone. It knows nothing
of names, batches, other adapters or files; this module knows no method and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from kitout.base.weights import FrozenModule
from kitout.errors import NotMergeable

KeyValue = tuple[Tensor, Tensor]  # keys, values
PartWeight = float | Callable[[], Tensor]  # of a part: fixed, or a trained one as it is now


class LowRankChange(NamedTuple):
    """A fold as a product and a shift: w + b a, bias + shift. None: that part is not changed."""

    a: Tensor | None
    """[r, d_in]."""
    b: Tensor | None
    """[d_out, r], any scale of the product in it."""
    shift: Tensor | None
    """[d_out]."""


class Delta(nn.Module):
    """A trained map at one site. Values are channels-last."""

    num_tokens: int = 0
    """Virtual tokens it adds: rows of `token_vectors` (port "tokens"), or of `key_values` (port "kv")."""
    after_first_token: bool = False
    """Its tokens come after the first token of the text (BOS, CLS), not before it."""
    pooled_by_classifier: bool = False
    """What follows the stack reads its first token where the first token of the text was (as a classifier does)."""
    reads_weight: bool = False
    """`forward` also takes a `FrozenModule`: weight [d_out, d_in], bias, and the module itself as a function."""
    replaces_module: ClassVar[bool] = False
    """`forward` does not read y, so the base's product can be skipped where it is active for a whole batch."""
    is_scale_shift: ClassVar[bool] = False
    """y' = scale * y + shift, so it also folds into the gain of a norm or into an input axis."""
    adds_linear_map: ClassVar[bool] = False
    """y' = y + a linear map of x + a constant: what it adds does not depend on y."""
    averages_positions: ClassVar[bool] = False
    """Port "parts": where every position sees all others, `combine` is given which positions are real, [rows, tokens],
    1 or 0. None where a position sees those before it alone: an average would show it what comes after."""
    is_watched: bool = False
    """Port "parts": `combine` is to be called with every part's value, though its parts could be joined."""
    loraplus_parameters: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters that may have a higher learning rate than the rest (LoRA+: the B of B A)."""

    def forward(self, x: Tensor, y: Tensor, frozen: FrozenModule | None = None) -> Tensor:
        """x [..., d_in], y [..., d_out] -> [..., d_out], each position on its own. Never writes to x or y."""
        raise NotImplementedError

    def forward_(self, x: Tensor, y: Tensor, frozen: FrozenModule | None = None) -> Tensor:
        """`forward`, but y is this call's own and may be overwritten."""
        return self(x, y, frozen) if self.reads_weight else self(x, y)

    def fused_linear(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor | None:
        """y' of a plain frozen linear with weight w and bias b: module and delta in one autograd node.

        Optional, for training. None where the frozen output and then `forward_` are as good.
        """
        return None

    @classmethod
    def fused_linears(
        cls, deltas: Sequence[Any], x: Tensor, linears: Sequence[tuple[Tensor, Tensor | None]]
    ) -> list[Tensor] | None:
        """The same of several frozen linears (weight, bias) that all read x, each with a delta of this class.

        Optional, for training. None where `fused_linear` of each is as good.
        """
        return None

    @classmethod
    def join(cls, addends: Sequence[tuple[Any, PartWeight]]) -> Delta | None:
        """y + sum_i w_i (delta_i(x, y) - y) as one Delta: several of this class, all at one site, with their weights.

        Optional, for a class that only adds to y. It reads their values, and weights that are functions, at each call:
        they may be in training.
        """
        return None

    @classmethod
    def fused_rows(
        cls,
        deltas: Sequence[Sequence[Any]],
        rows: Sequence[int],
        x: Tensor,
        linears: Sequence[tuple[Tensor, Tensor | None]],
        cache: dict[str, Any],
    ) -> list[Tensor] | None:
        """The same where each row of x has deltas of its own: row i goes through deltas[rows[i]], one per linear.

        Below 0 a row has none. Optional, for training; `cache` lives as long as this composition of rows.
        """
        return None

    def token_vectors(self) -> Tensor:
        """Port "tokens": the vectors [num_tokens, d] that this site adds to the sequence."""
        raise NotImplementedError

    def key_values(self) -> tuple[Tensor, Tensor]:
        """Port "kv": keys and values, each [H_kv, num_tokens, d_h], that every query sees before those of the text.

        Keys are as the attention call takes them: no rotation, projection or norm comes after.
        """
        raise NotImplementedError

    def key_value_sources(self) -> Iterable[Tensor]:
        """Port "kv": the tensors that `key_values` depends on."""
        return self.parameters()

    def combine(self, x: Tensor, y: Tensor, values: Sequence[Tensor], real: Tensor | None = None) -> Tensor:
        """Port "parts": what the module gives, [..., d_out], of what it gives as each part leaves it.

        x: the site's input. y: what the frozen module gives. values: the same as part i leaves the module; y itself
        where the part has nothing there. real: for `averages_positions`.
        """
        raise NotImplementedError

    def part_weights(self, x: Tensor, y: Tensor, values: Sequence[Tensor], real: Tensor | None = None) -> Tensor:
        """Port "parts": the weight that `combine` gives each part, [..., parts], with fewer axes where it is one."""
        raise NotImplementedError

    def mixing_weights(self) -> Tensor | None:
        """Port "parts": w [parts], where `combine` is y + sum_i w_i (values_i - y) and w depends on no input."""
        return None

    def penalty(self) -> Tensor | None:
        """What training adds to the loss for this Delta's values, once per step; None for nothing."""
        return None

    def inference_form(self) -> Delta:
        """The same map without what only training needs (an encoder of its values). Itself where there is nothing."""
        return self

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """w [d_out, d_in], b [d_out] | None, in working precision -> the same, exactly equal to forward.

        Raises NotMergeable where no weights give the same function. Never writes to w or b.
        """
        raise NotMergeable(f"{type(self).__name__} is not a linear map: no weights give the same function")

    def low_rank_change(self) -> LowRankChange | None:
        """What `fold` adds, as factors, in which arithmetic stays; None where it is no product of low rank."""
        return None

    def parameter_values(self) -> dict[str, Tensor] | None:
        """Whole parameters by name, for a trained copy of a module that is neither a matrix nor a norm."""
        return None

    def base_tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """The frozen tensors that this delta holds trained copies of, by the names of the copies.

        Files keep such a copy as its difference from the frozen tensor.
        """
        return {}

    @classmethod
    def forward_rows(
        cls, deltas: Sequence[Any], rows: Sequence[int], x: Tensor, y: Tensor, cache: dict[str, Any]
    ) -> Tensor | None:
        """Rows of one batch, each through its own delta: row i through deltas[rows[i]], unchanged where rows[i] < 0.

        Optional fast path for plain linear sites; y may be overwritten. `cache` lives as long as this composition of
        rows at this site. None means that there is no fast path, and the caller loops over the deltas.
        """
        return None
