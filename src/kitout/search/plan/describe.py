"""Every setting of a plan in words, for --help, and a plan to begin with.

Names, types, defaults and texts are the schema's own; the settings of `run` are those of `kitout train`. It knows no
screen.
"""

from __future__ import annotations

from kitout.search.plan.schema import SearchPlan
from kitout.search.plan.space import SpaceConfig
from kitout.train.config.describe import SectionDoc, sections

EXAMPLE = """\
# A search: kitout search plan.yaml
run:                       # any run of `kitout train`; it gives the design that is to be beaten as well
  model: smollm2-135m
  data: {train: {path: tweets, limit: 1200}, validation: 200, test: 400}
space:
  method: [LoRA, IA3, Houlsby, AdaptFormer, PrefixTuning]
  LoRA: {rank: [2, 4, 8, 16], targets: [attn.q attn.v, all-linear, mlp.*], layers: [all, "last:8"]}
  Houlsby: {width: {low: 8, high: 64, log: true}}
  lr: {multipliers: [0.3, 3.0]}   # times the method's own, log-uniform
budget:
  max_trainable_parameters: 1000000   # of one candidate, heads included
  max_latency: 1.10                   # times the frozen model's forward
# goal: {metric: accuracy, max_forgetting: 0.02}
candidates: 16
halving: {factor: 4, first: 0.0625}
confirm: {seeds: [0, 1, 2]}
out: runs/search
"""


def plan_sections() -> tuple[SectionDoc, ...]:
    """The sections of a plan, without those of its run."""
    docs = (doc for doc in sections(SearchPlan) if not doc.name.startswith("run"))
    return tuple(_without_settings(doc) if doc.name == "space" else doc for doc in docs)


def _without_settings(doc: SectionDoc) -> SectionDoc:
    """What stands under the names of methods is said in the text."""
    text = f"{doc.text} {SpaceConfig.model_fields['settings'].description}"
    return SectionDoc(doc.name, text, tuple(one for one in doc.settings if one.name != "settings"))
