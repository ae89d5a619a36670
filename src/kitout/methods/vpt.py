"""Visual prompt tuning: trained tokens among the patches, at the first block or new ones at every block.

Jia et al. 2022 (arXiv 2203.12119), eqs. 4-8; code KMnP/vpt (src/models/vit_prompt/vit.py). Z0 = [cls; P; patches] after
positions were added; deep: before each later block the p slots are overwritten by that block's own P. Start: uniform in
+-sqrt(6 / (3 patch^2 + d)). Projection: P [p, k] through one Linear(k, d) shared by all blocks (kaiming normal, fan
out). The base is in eval mode while a prompt trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from kitout.base.select import select
from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.delta import Delta
from kitout.errors import TargetError
from kitout.method import Method, TrainingDefaults, register


class SharedVisualPrompts(nn.Module):
    """What all blocks have in common: a projection [k -> d], the prompt itself, or both."""

    def __init__(self, prompt: nn.Parameter | None, projection: nn.Linear | None) -> None:
        super().__init__()
        self.prompt, self.projection = prompt, projection


class VisualPromptDelta(Delta):
    """prompt [p, d], or [p, k] where a projection follows; None where all blocks share one."""

    def __init__(self, prompt: nn.Parameter | None, shared: SharedVisualPrompts, length: int, dropout: float) -> None:
        super().__init__()
        self.prompt = prompt
        # In a tuple, which registers nothing: its parameters are the adapter's, not this Delta's.
        self._shared: tuple[SharedVisualPrompts] = (shared,)
        self.dropout, self.num_tokens, self.after_first_token = dropout, length, True

    def token_vectors(self) -> Tensor:
        (shared,) = self._shared
        rows = shared.prompt if self.prompt is None else self.prompt
        assert rows is not None
        if shared.projection is not None:
            rows = shared.projection(rows)
        return F.dropout(rows, self.dropout) if self.dropout and self.training else rows


@register
class VPT(Method):
    """Trained tokens in the image's sequence; the output keeps its shape.

    length: how many. deep: new ones at every block (of `layers`), else at the first alone. share: deep, with the same
    tokens everywhere. projection: width k of the trained tokens before one shared Linear(k, d). dropout: on the tokens.
    layers="last:4" starts at the fourth block from the end.
    """

    default_location: ClassVar[str] = "first block; deep: every block"
    limitations: ClassVar[str] = "not in a Mix; no strength but on and off"
    training: ClassVar[TrainingDefaults] = TrainingDefaults(1e-2, min_steps=200)
    mergeable: ClassVar[bool] = False
    starts_as_identity: ClassVar[bool] = False
    trains_in_eval_mode: ClassVar[bool] = True

    length: int = Field(default=10, ge=1)
    deep: bool = False
    share: bool = False
    projection: int | None = Field(default=None, ge=1)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _check_settings(self) -> VPT:
        if self.targets is not None:
            raise ValueError("VPT sits at whole blocks: choose layers=, not targets=")
        if self.share and not self.deep:
            raise ValueError("share=True means the same tokens at every block: it needs deep=True")
        return self

    def sites(self, survey: Survey) -> list[Site]:
        towers = [t for t in survey.towers if t.embedder is None]
        if not survey.proven or not towers:
            why = survey.unproven_reason or "its blocks are fed from a token table; PromptTuning is for text"
            raise TargetError(f"VPT needs a stack of blocks that reads an image: {why}")
        windows = [
            s.path for s in survey.sites if s.role.startswith("attn.") and s.batch_relation in ("multiple", "none")
        ]
        if len(towers) > 1 or windows:
            why = f"{windows[0]} attends within windows" if windows else f"{towers[1].path} is a stack of its own"
            raise TargetError(f"VPT needs one sequence that all blocks attend over, and {why}")
        if not towers[0].takes_tokens:
            raise TargetError(
                f"VPT needs blocks of [batch, tokens, width], and {towers[0].path} keeps rows and columns"
            )
        biased = [path for path in sorted(survey.biased_attentions) if path.startswith(f"{towers[0].path}.")]
        if biased:
            raise TargetError(f"VPT: {biased[0]} adds a bias by position, which tokens between the patches lack")
        patch = next((s for s in survey.sites if s.role == "patch"), None)
        if patch is None:
            raise TargetError(
                "VPT starts at the scale of the patch embedding, and none was found: name the module that cuts the "
                "image, kitout.attach(model, roles={r'path$': 'patch'})"
            )
        tower = towers[0].path
        blocks = [s for s in select(survey.sites, "block", self.layers) if s.tower == tower]
        patch_size = patch.module.get_parameter("weight")[0].numel()  # values per patch
        sites = [s.replace(port="tokens", d_in=patch_size) for s in blocks]
        return sites if self.deep else sites[:1]

    def build_shared(self, sites: Sequence[Site]) -> nn.Module | None:
        if not self.share and self.projection is None:
            return None
        projection = None
        if self.projection is not None:
            projection = nn.Linear(self.projection, sites[0].d_out)
            nn.init.kaiming_normal_(projection.weight, a=0, mode="fan_out")
        return SharedVisualPrompts(self._init_prompt(sites[0]) if self.share else None, projection)

    def _init_prompt(self, site: Site) -> nn.Parameter:
        width = site.d_out if self.projection is None else self.projection
        bound = math.sqrt(6 / (site.d_in + width))
        return nn.Parameter(torch.empty(self.length, width).uniform_(-bound, bound))

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        shared = shared if isinstance(shared, SharedVisualPrompts) else SharedVisualPrompts(None, None)
        prompt = self._init_prompt(site) if shared.prompt is None else None
        return VisualPromptDelta(prompt, shared, self.length, self.dropout)

    def num_parameters(self, sites: Sequence[Site]) -> int:
        d, k = sites[0].d_out, self.projection
        tokens = self.length * (d if k is None else k) * (1 if self.share else len(sites))
        return tokens + (0 if k is None else (k + 1) * d)
