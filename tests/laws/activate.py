"""What every law needs: one kit per species and process, adapters with no trivial value in them, and comparisons.

The kits are shared between tests, so an adapter is added with `activated` or `added`, which remove it again and
check that the base still has its own bits. It knows the zoo and the kit's public surface, and no method.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import kitout
from kitout import Average, Kit, Method
from kitout.base.site import Site
from kitout.runtime.adapter import Adapter
from kitout.search import signals
from kitout.signals.site_signals import Signals
from laws.cases import Case
from zoo import DEVICE, EXTRA, ZOO, Specimen, out

NAME = "law"  # what an adapter under test is called
TOLERANCE = 1e-5
SPECIES: dict[int, str] = {}  # shared kits by id, which live as long as the process


@cache
def pristine(name: str) -> nn.Module:
    """The species, built once per process and never touched: copy it."""
    return {**ZOO, **EXTRA}[name].build()


def fresh_model(specimen: Specimen) -> nn.Module:
    return copy.deepcopy(pristine(specimen.name))


@cache
def _attached(name: str, dtype: torch.dtype) -> Kit:
    return kitout.attach(copy.deepcopy(pristine(name)).to(dtype))


def fresh_kit(specimen: Specimen, dtype: torch.dtype = torch.float32) -> Kit:
    """A kit of one's own, for a test that spoils it: a copy of one that is attached once per process."""
    return copy.deepcopy(_attached(specimen.name, dtype))


@cache
def kit_of(specimen: Specimen, attention: str = "") -> Kit:
    """The process's kit of a species. attention: "eager" or "sdpa"; as built if empty."""
    model = fresh_model(specimen)
    if attention:
        set_attention(model, attention)
    kit = kitout.attach(model)
    SPECIES[id(kit)] = specimen.name
    return kit


def set_attention(model: nn.Module, attention: str) -> None:
    """transformers' switch, and timm's (each attention's `fused_attn`)."""
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(attention)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = attention == "sdpa"


def untrivial(adapter: Adapter, seed: int = 0) -> None:
    """Every tensor moved off its initial value, so that nothing that matters is zero or one."""
    draw = torch.Generator().manual_seed(zlib.crc32(repr(adapter.method).encode()) + seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            noise = torch.randn(parameter.shape, generator=draw).to(parameter.device)
            parameter.add_(noise, alpha=0.1 if parameter.ndim < 2 else 0.05)


def add_parts(kit: Kit, case: Case) -> None:
    """The adapters that a case composes, with untrivial values, where the kit does not have them yet."""
    for name, method in case.parts:
        if name not in kit:
            untrivial(kit.add(name, method, seed=0))


def start_of(specimen: str, method: Method) -> Signals | None:
    """What a method that starts from data has collected on the species of this name; None where it needs no data."""
    return None if method.without_start() is method else _collected({**ZOO, **EXTRA}[specimen], method)


@cache
def _collected(specimen: Specimen, method: Method) -> Signals:
    kit = fresh_kit(specimen)
    batches = [specimen.batch(4, seed) for seed in range(3)]
    options = method.start_options(method.sites(kit.survey))
    return signals(kit, batches, lambda model, batch: loss_of(model(**batch)), **options)


def put_on(kit: Kit, method: Method, name: str = NAME, *, seed: int = 0, start: Signals | None = None) -> Adapter:
    """A new adapter with untrivial values; the caller owns the kit."""
    adapter = kit.add(name, method, seed=seed, start=start)
    untrivial(adapter, seed)
    return adapter


def kit_with(specimen: str, **methods: Method) -> tuple[Kit, dict[str, Tensor]]:
    """A kit of one's own with these adapters by name, and a batch of two for it."""
    kit = fresh_kit({**ZOO, **EXTRA}[specimen])
    for seed, (name, method) in enumerate(methods.items()):
        put_on(kit, method, name, seed=seed)
    return kit, {**ZOO, **EXTRA}[specimen].batch(2, 0)


@contextmanager
def added(kit: Kit, *cases: Case, fresh: bool = False) -> Iterator[list[str]]:
    """The cases as adapters of a shared kit, for the time of a test; their names. fresh: values as initialised."""
    assert kit.names == [], "a test left its adapter on a shared kit"
    try:
        for case in cases:
            add_parts(kit, case)
            adapter = kit.add(case.name, case.method, seed=0, start=start_of(SPECIES[id(kit)], case.method))
            if not fresh:
                untrivial(adapter)
        yield [case.name for case in cases]
    finally:
        if kit.merged:
            kit.unmerge()
        kit.use(None)
        kit.eval()
        for name in reversed(kit.names):  # a part after what it is a part of
            kit.remove(name)
    assert_base_bits(kit)


@contextmanager
def activated(kit: Kit, case: Case, *, fresh: bool = False) -> Iterator[Adapter]:
    """`added`, and active."""
    with added(kit, case, fresh=fresh), kit.use(case.name):
        yield kit[case.name]


def assert_base_bits(kit: Kit) -> None:
    """The base of a shared kit holds its own values and nothing else."""
    now, then = kit.base.state_dict(), pristine(SPECIES[id(kit)]).state_dict()
    assert list(now) == list(then)
    changed = [key for key, value in then.items() if not torch.equal(now[key], value)]
    assert not changed, f"the base has changed: {changed}"


@torch.no_grad()
def run(model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
    return out(model(**batch))


def far(a: Tensor, b: Tensor) -> float:
    """Largest difference, measured against values larger than one."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    if not a.numel():
        return 0.0
    scale = max(1.0, b.abs().max().item())
    return (a - b).abs().max().item() / scale


def assert_same(a: Tensor, b: Tensor, tolerance: float = TOLERANCE, what: str = "") -> None:
    distance = far(a, b)
    assert distance <= tolerance, f"{what} differs by {distance:.2e}, allowed {tolerance:.0e}"


def loss_of(output: Any, seed: int = 0) -> Tensor:
    """A scalar that depends on every value of the output, row by row alike."""
    value = out(output)
    weight = torch.randn(value.shape[1:], generator=torch.Generator().manual_seed(seed))
    return (value.float() * weight.to(value.device)).sum(dim=tuple(range(1, value.ndim))).sum() / value[
        0
    ].numel() ** 0.5


def gradients(adapter: Adapter) -> dict[str, Tensor]:
    """Copies of the gradients by name; zeros where there is none."""
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for n, p in adapter.named_parameters()
    }


def inert(site: Site, parameter: str, specimen: Specimen) -> bool:
    """True where mathematics, not a mistake, makes a parameter without effect.

    A shift on keys adds the same number to every score of a query, which the softmax takes off again; unless keys are
    rotated after it, or normalised.
    """
    shift = parameter.rpartition(".")[2] in ("shift", "bias")
    return shift and site.role in ("attn.k", "cross.k") and (specimen.positions != "rotary" or site.role == "cross.k")


def unmergeable(adapter: Adapter) -> set[str]:
    """Paths of sites where no weights give the same function.

    All of a method that says so, shifts on norms that have no place for a bias, tables that scale what they look up. An
    Average has no site: its name.
    """
    if isinstance(adapter.method.fixed_route(), Average):
        return {adapter.name}
    if not adapter.method.mergeable:
        return {site.path for site in adapter.sites}
    shifted = {
        s.path for s in adapter.sites if s.kind == "norm" and "bias" not in s.module._parameters and shifts(adapter, s)
    }
    return shifted | {s.path for s in adapter.sites if getattr(s.module, "embed_scale", 1.0) != 1.0}


def gains_keys(adapter: Adapter) -> bool:
    """True where merging gives a module of a transformers model a bias that its config cannot bring back."""
    return any(
        site.kind in ("linear", "conv", "norm") and _lacks_bias(site) and shifts(adapter, site)
        for site in adapter.sites
    )


def _lacks_bias(site: Site) -> bool:
    return site.module._parameters.get("bias") is None


@torch.no_grad()
def shifts(adapter: Adapter, site: Site) -> bool:
    """True where the delta adds something that does not depend on the input: what it makes of zeros is not zero."""
    y = torch.zeros(2, site.d_out, device=DEVICE)
    delta = adapter.delta(site)
    return not delta.reads_weight and bool(delta(torch.zeros(2, site.d_in, device=DEVICE), y).any())
