"""The Delta: a trained map at one site, y' = delta(x, y), the one thing all else is written over.

Routing, stacking, mixing, strength, merging, counting and saving are written once over `Delta` alone. It knows nothing
of names, batches, other adapters or files; this module knows no method and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from kitout.base.weights import FrozenModule
from kitout.errors import NotMergeable

KeyValue = tuple[Tensor, Tensor]  # keys and values


class Delta(nn.Module):
    """A trained map at one site. Values are channels-last.

    length: positions it adds to a sequence: rows of `tokens` (port "tokens") or keys and values of `past` (port "kv").
    after: its tokens come after the first token of the text (BOS, CLS), not before it.
    pooled: what follows the stack finds the first of its tokens where the text's first was (a classifier reads it).
    reads_weight: True if `forward` also takes the frozen module's view (`Frozen`: its weight [d_out, d_in], its bias,
    and the module itself as a function).
    replaces: True if `forward` does not read y, so the base's product can be skipped when a whole batch wears it.
    elementwise: True if y' = scale * y + shift, so that it folds into a norm's gain or an input axis as well.
    late: its parameters that may learn faster than the rest (LoRA+: the B of B A), by name.
    """

    num_tokens: int = 0
    after_first_token: bool = False
    pooled_by_classifier: bool = False
    reads_weight: bool = False
    replaces_module: ClassVar[bool] = False
    is_scale_shift: ClassVar[bool] = False
    loraplus_parameters: ClassVar[tuple[str, ...]] = ()

    def forward(self, x: Tensor, y: Tensor, frozen: FrozenModule | None = None) -> Tensor:
        """x [..., d_in], y [..., d_out] -> [..., d_out], each position on its own. Never writes to x or y."""
        raise NotImplementedError

    def forward_(self, x: Tensor, y: Tensor, frozen: FrozenModule | None = None) -> Tensor:
        """`forward`, but y is this call's own and may be overwritten."""
        return self(x, y, frozen) if self.reads_weight else self(x, y)

    def fused_linear(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor | None:
        """y' of a plain frozen linear with weight w and bias b, module and delta in one go.

        Optional, for training: None where the output first and `update` after it is as good.
        """
        return None

    def token_vectors(self) -> Tensor:
        """Port "tokens": the vectors [length, d] that this site puts into the sequence."""
        raise NotImplementedError

    def key_values(self) -> tuple[Tensor, Tensor]:
        """Port "kv": keys and values, each [H_kv, length, d_h], that every query sees before those of the text.

        Keys as the attention call takes them: no rotation, projection or norm comes after.
        """
        raise NotImplementedError

    def inference_form(self) -> Delta:
        """The same map without what only training needs (an encoder of its values); itself where there is none."""
        return self

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """w [d_out, d_in], b [d_out] | None, in working precision -> the same, exactly equal to forward.

        Raises NotMergeable where no weights give the same function. Never writes to w or b.
        """
        raise NotMergeable(f"{type(self).__name__} is not a linear map: no weights give the same function")

    def parameter_values(self) -> dict[str, Tensor] | None:
        """Whole parameters by name, for a delta that is a trained copy of a module which is no matrix and no norm."""
        return None

    def base_tensors(self, module: nn.Module) -> dict[str, Tensor]:
        """Where this delta holds trained copies of a frozen module's tensors: those tensors, by the copies' own names.

        Files keep such a copy as its difference from them.
        """
        return {}

    @classmethod
    def forward_rows(
        cls, deltas: Sequence[Any], rows: Sequence[int], x: Tensor, y: Tensor, cache: dict[str, Any]
    ) -> Tensor | None:
        """Rows of one batch, each through its own delta: row i through deltas[rows[i]], untouched where rows[i] < 0.

        Optional fast path for plain linear sites; y may be overwritten. scratch lives as long as this composition of
        rows at this site. None means there is no fast path here and the caller loops over the deltas.
        """
        return None
