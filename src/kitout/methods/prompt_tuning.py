"""Prompt tuning: trained vectors in front of the text, at the token embedding.

Lester et al. 2021 (arXiv 2104.08691); code google-research/prompt-tuning (prompts.py): X' = [P; E(x)], P [p, d], after
the token embedding and before positions, so text positions shift by p; encoder-decoders take it in the encoder. Starts
from p of the first 5,000 rows of the vocabulary without replacement, from text, from class labels (mean of their
tokens, then rows of the vocabulary), or normal at the table's own scale.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kitout.base.site import Site
from kitout.base.survey import Survey, Tower
from kitout.delta import Delta
from kitout.errors import ConfigError, TargetError
from kitout.method import Method, TrainingDefaults, register

MAX_SAMPLED_ROWS = 5000  # rows of the vocabulary to sample from: tokenizers number frequent tokens first
PromptInit = Literal["vocab", "normal"] | tuple[int, ...] | tuple[tuple[int, ...], ...]


class PromptDelta(Delta):
    """prompt [p, d]."""

    def __init__(self, prompt: Tensor, after_first_token: bool, pooled_by_classifier: bool) -> None:
        super().__init__()
        self.prompt = nn.Parameter(prompt)
        self.num_tokens = prompt.shape[0]
        self.after_first_token, self.pooled_by_classifier = after_first_token, pooled_by_classifier

    def token_vectors(self) -> Tensor:
        return self.prompt


@register
class PromptTuning(Method):
    """Trained vectors [length, d] beside the embedded text of one stack of blocks.

    length: how many. init: "vocab", "normal", token ids of a text (repeated or cut to length), or the ids of each class
    label. place: "before" the text or "after" its first token (BOS, CLS). stacks: "encoder", "decoder" or "both" of an
    encoder-decoder; ignored where there is one stack. pooled: "prompt" gives an encoder's head the output of the first
    prompt where it looks for that of the first token, as Hugging Face PEFT's classifiers have it.
    """

    default_location: ClassVar[str] = "token embedding"
    limitations: ClassVar[str] = "not in a Mix; no strength but on and off"
    training: ClassVar[TrainingDefaults] = TrainingDefaults(1e-2, min_steps=200)
    mergeable: ClassVar[bool] = False
    starts_as_identity: ClassVar[bool] = False

    length: int = Field(default=20, ge=1)
    init: PromptInit = "vocab"
    place: Literal["before", "after"] = "before"
    stacks: Literal["encoder", "decoder", "both"] = "encoder"
    pooled: Literal["text", "prompt"] = "text"

    @model_validator(mode="after")
    def _check_settings(self) -> PromptTuning:
        if self.targets is not None or self.layers != "all":
            raise ValueError("a prompt sits at the token embedding: it has no targets and no layers")
        if not self.init or (isinstance(self.init, tuple) and any(i == () for i in self.init)):
            raise ValueError(f"init={self.init!r} holds no token: give ids, 'vocab' or 'normal'")
        if self.pooled == "prompt" and self.place == "after":
            raise ValueError("pooled='prompt' puts the first prompt before the first token: it needs place='before'")
        return self

    def sites(self, survey: Survey) -> list[Site]:
        towers = [t for t in survey.towers if t.embedder is not None]
        if not towers:
            raise TargetError(
                f"PromptTuning needs a stack fed from a token table: {survey.unproven_reason or 'none was seen'}"
            )
        if len(towers) > 1 and self.stacks != "both":
            kinds = {t.causal: "decoder" if t.causal else "encoder" for t in towers if t.causal is not None}
            towers = [t for t in towers if t.causal == (self.stacks == "decoder")]
            if not towers:
                choices = " or ".join(f"stacks={kind!r}" for kind in (*sorted(kinds.values()), "both"))
                raise TargetError(f"stacks={self.stacks!r}: this model has no {self.stacks} of tokens; write {choices}")
        _check_towers(survey, towers)
        if self.pooled == "prompt" and (len(survey.towers) > 1 or any(t.causal for t in towers)):
            raise TargetError(
                f"pooled='prompt' is for the head of an encoder that stands alone, and {towers[0].path} is none: leave "
                "it at 'text'"
            )
        tables = [(survey.by_path(t.token_embedding), t.path) for t in towers]
        return [s.replace(port="tokens", tower=tower, d_in=s.d_out) for s, tower in tables]

    def build(self, site: Site, shared: nn.Module | None) -> Delta:
        return PromptDelta(self._init_rows(site), self.place == "after", self.pooled == "prompt")

    def _init_rows(self, site: Site) -> Tensor:
        weight = site.module.get_parameter("weight")
        if weight.is_meta:
            return torch.empty(self.length, site.d_out)
        size = weight.shape[0]
        if self.init == "normal":
            rows = _embed_ids(site, torch.arange(min(size, MAX_SAMPLED_ROWS)))
            return torch.randn(self.length, site.d_out) * rows.std()
        if self.init == "vocab":
            return _embed_ids(site, self._sample_rows(size, self.length))
        bad = [i for entry in self.init for i in (entry if isinstance(entry, tuple) else (entry,)) if not 0 <= i < size]
        if bad:
            raise ConfigError(f"init holds the token ids {bad[:5]}, and the table has rows 0 to {size - 1}")
        if isinstance(self.init[0], int):
            ids = torch.tensor([self.init[i % len(self.init)] for i in range(self.length)])
            return _embed_ids(site, ids)
        label_means = [_embed_ids(site, torch.tensor(label)).mean(0) for label in self.init][: self.length]
        sampled = _embed_ids(site, self._sample_rows(size, self.length - len(label_means)))
        return torch.cat((torch.stack(label_means), sampled))

    @staticmethod
    def _sample_rows(size: int, n: int) -> Tensor:
        return torch.randperm(max(min(size, MAX_SAMPLED_ROWS), min(size, n)))[torch.arange(n) % size]

    def num_parameters(self, sites: Sequence[Site]) -> int:
        return sum(self.length * s.d_out for s in sites)


def _embed_ids(site: Site, ids: Tensor) -> Tensor:
    """Rows as the model embeds them, with the scale that its table applies."""
    rows: Tensor = site.module(ids.to(site.module.get_parameter("weight").device))
    return rows.detach().float().cpu()


def _check_towers(survey: Survey, towers: Sequence[Tower]) -> None:
    """Raises TargetError where a prompt cannot run: causal blocks need it as keys and values of every attention."""
    for tower in towers:
        if tower.causal is None:
            raise TargetError(f"PromptTuning: the probe could not find out whether {tower.path} is causal")
        if not tower.causal and tower.reads_inputs_again:
            raise TargetError(
                f"PromptTuning: {tower.embedder or 'the model'} reads its ids or mask again after its blocks, where a "
                "prompt has moved them; PrefixTuning moves nothing"
            )
        if not tower.causal:
            continue
        runners = [survey.model.get_submodule(path) for path in (tower.embedder or "", tower.block_runner)]
        takes = [set(inspect.signature(module.forward).parameters) for module in runners]
        runs_vectors = "inputs_embeds" in takes[0] or {"inputs_embeds", "position_ids"} <= takes[1]
        if not tower.reads_ids and not runs_vectors:
            raise TargetError(
                f"PromptTuning: {type(runners[0]).__name__} takes no inputs_embeds to run a prompt by itself"
            )
        refusals = {path: why for path, why in survey.kv_refusals.items() if path.startswith(f"{tower.path}.")}
        for block in survey.blocks:
            if block.tower == tower.path and not block.has_attention:
                refusals.setdefault(block.path, "it has no attention")
        for path, why in refusals.items():
            raise TargetError(f"PromptTuning cannot reach {path}: {why}")
