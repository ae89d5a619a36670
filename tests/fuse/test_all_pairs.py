"""Every pair of methods that merge, on every model of the zoo, in float64: a Mix is the arithmetic of the two folds, a
Stack is the second folded on top of the first.

The expected outputs are those of the plain model under the folded weights; no hook is in their way.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fuse.parts import change, kit_of
from kitout import IA3, SSF, BitFit, FullFineTuning, Kit, LoRA, Mix, PartialFineTuning, Stack
from kitout.method import registered_methods
from kitout.runtime.merge.fold import fold_all
from zoo import Specimen, out

METHODS = {
    "lora": LoRA(rank=3, alpha=5, targets="attn.* mlp.*"),
    "in": LoRA(rank=2, targets="in:attn.* in:mlp.*"),
    "dora": LoRA(rank=3, dora=True, targets="all-linear"),
    "ia3": IA3(targets="in:attn.* in:mlp.* attn.*"),
    "ssf": SSF(std=0.1, targets="attn.* mlp.*"),
    "full": FullFineTuning(targets="attn.* mlp.* norm"),
    "bitfit": BitFit(targets="attn.v attn.o mlp.*"),
    "norms": PartialFineTuning(part="norms"),
}
PAIRS = list(itertools.combinations(METHODS, 2))


def test_every_method_that_merges_is_here() -> None:
    merging = {m for m in registered_methods() if m.mergeable and not m.model_fields.keys() & {"of", "route"}}
    assert merging == {type(method) for method in METHODS.values()}


class Plain:
    """A model without hooks, with a bias of zeros wherever some adapter makes one."""

    def __init__(self, specimen: Specimen, new: set[str]) -> None:
        self.model = specimen.build().double()
        batch = specimen.batch(2, 0)
        self.batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        self.base = dict(self.model.named_parameters(remove_duplicate=False))
        for path in new - self.base.keys():
            owner, _, name = path.rpartition(".")
            module = self.model.get_submodule(owner)
            assert name == "bias"
            assert module._parameters[name] is None, path
            module.bias = nn.Parameter(torch.zeros(module.weight.shape[0], dtype=torch.float64))
        self.base = dict(self.model.named_parameters(remove_duplicate=False))

    @torch.no_grad()
    def run(self, weights: Mapping[str, Tensor]) -> Tensor:
        return out(torch.func.functional_call(self.model, dict(weights), (), self.batch, tie_weights=False))


def folded(kit: Kit, entry: Stack) -> dict[str, Tensor]:
    names = {name: kit[name] for name in kit.names}
    modules = fold_all(names, entry, kit.survey)
    return {f"{p}.{k}" if p else k: v for p, of_module in modules.items() for k, v in of_module.parameters.items()}


@torch.no_grad()
def test_mix_is_arithmetic_and_stack_is_fold_order(specimen: Specimen) -> None:
    kit = kit_of(specimen.name, METHODS)
    changes = {name: change(kit, {name: 1.0}) for name in METHODS}
    plain = Plain(specimen, set().union(*changes.values()))
    untouched = plain.run({})
    far = {}
    for number, (a, b) in enumerate(PAIRS):
        weights = {a: 0.7, b: -0.4}
        summed = dict(plain.base)
        for name, weight in weights.items():
            summed |= {path: summed[path] + weight * value for path, value in changes[name].items()}
        order = (a, b) if (number + len(specimen.name)) % 2 else (b, a)
        for entry, expected in ((Mix(weights), summed), (Stack(*order), folded(kit, Stack(*order)))):
            wanted = plain.run({**plain.base, **expected})
            assert (wanted - untouched).abs().max() > 1e-3, entry
            with kit.use(entry):
                found = out(kit(**plain.batch))
            far[entry] = float((found - wanted).abs().max() / wanted.abs().max())
    assert {entry: distance for entry, distance in far.items() if not distance <= 1e-9} == {}
