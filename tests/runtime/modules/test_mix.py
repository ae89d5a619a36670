"""A Mix is f(x) + sum_i w_i (f_i(x) - f(x)) at every module, with no more runs of the module than that takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import kitout
from kitout import (
    IA3,
    SSF,
    BitFit,
    FullFineTuning,
    Houlsby,
    Kit,
    LoRA,
    Mix,
    PrefixTuning,
    PromptTuning,
    Stack,
)
from kitout.errors import NotMergeable, RouteError
from kitout.route import RouteEntry, simplify
from laws.activate import assert_same, kit_with, put_on, run
from zoo import ZOO, rows_of

METHODS = {
    "gain-in": IA3(targets="in:mlp.down"),
    "lora-in": LoRA(rank=2, alpha=3, targets="in:mlp.down"),
    "ssf-in": SSF(targets="in:mlp.down"),
    "lora": LoRA(rank=2, alpha=3, targets="mlp.down"),
    "bitfit": BitFit(targets="mlp.down"),
    "ssf": SSF(targets="mlp.down"),
    "dora": LoRA(rank=2, alpha=3, dora=True, targets="mlp.down"),
    "full": FullFineTuning(targets="mlp.down"),
    "houlsby": Houlsby(width=3, norms=False, targets="sub.mlp"),
}
Map = Callable[[Tensor], Tensor]


def exact_kit(specimen: str, **methods: Any) -> tuple[Kit, dict[str, Tensor]]:
    kit, batch = kit_with(specimen, **methods)
    for module in (kit.base, *(kit[name] for name in kit.names)):
        module.double()
    return kit, {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


class Runs(TorchFunctionMode):
    """Counts the products with one frozen weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.number = weight, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is F.linear and args[1] is self.weight
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def one_module() -> tuple[Kit, str]:
    """A kit whose adapters all sit at one projection, and the path of that."""
    kit, _ = exact_kit("vit", **METHODS)
    kit.strength("lora-in", 0.6)
    kit.strength("dora", 1.3)
    return kit, kit["lora"].sites[0].path


def as_defined(kit: Kit, path: str, entry: RouteEntry, f: Map) -> Map:
    """The module f as the entry leaves it, from the definition and single adapters alone."""
    if isinstance(entry, str):
        m = kit[entry].by_module[path]
        return lambda x: m.map_output(m.map_input(x), f(m.map_input(x)), False)
    if isinstance(entry, Stack):
        for part in entry.parts:
            f = as_defined(kit, path, part, f)
        return f
    assert isinstance(entry, Mix)
    maps = [(as_defined(kit, path, part, f), w) for part, w in entry.parts]
    return lambda x: f(x) + sum(w * (f_i(x) - f(x)) for f_i, w in maps)


@pytest.mark.parametrize(
    ("entry", "runs"),
    [
        (Mix({"lora": 0.7, "bitfit": -0.3, "ssf": 0.5, "dora": 0.2}), 1),
        (Mix({"gain-in": 0.7, "lora-in": -0.3, "ssf-in": 0.2}), 1),
        (Mix({"gain-in": 0.7, "lora": 0.5, "bitfit": 0.4}), 1),
        (Mix({"gain-in": 0.7, "ssf": 0.5}), 2),
        (Mix({"gain-in": 0.7, "lora-in": -0.3, "dora": 0.5}), 3),
        (Mix({"gain-in": 0.4, "lora-in": 0.6}), 1),
        (Mix({Stack("gain-in", "ssf"): 0.4, Stack("full", "lora-in"): 0.6}), 2),
        (Mix({"gain-in": 0.7, "houlsby": 0.5, "full": 0.1}), 2),
        (Mix({"lora": 0.5, Mix({"gain-in": 0.7, "full": 1.5}): -0.5}), 2),
        (Stack("ssf", Mix({"gain-in": 0.7, "full": 0.5}), "lora-in"), 2),
        (Stack("lora-in", Mix({"gain-in": 0.7, "lora": 0.5})), 1),
        (Stack(Mix({"gain-in": 0.7, "ssf": 0.5}), Mix({"ssf-in": 0.7, "houlsby": 0.5})), 4),
        (Stack("houlsby", Mix({"gain-in": 0.7, "lora-in": 0.5})), 3),
    ],
    ids=lambda value: str(value).replace("parts=", ""),
)
def test_the_law_at_one_module_and_its_runs(one_module: tuple[Kit, str], entry: RouteEntry, runs: int) -> None:
    kit, path = one_module
    module = kit.base.get_submodule(path)
    x = torch.randn(2, 3, module.in_features, dtype=torch.float64)
    with kit.use(entry), Runs(module.weight) as counted:
        got = module(x)
    assert counted.number == runs
    want = as_defined(kit, path, entry, lambda x: type(module).frozen_forward(module, x))(x)
    assert_same(got, want, 1e-12)
    parameters = [p for name in kit.names for p in kit[name].parameters()]
    of_got, of_want = (torch.autograd.grad(y.square().sum(), parameters, allow_unused=True) for y in (got, want))
    assert any(gradient is not None for gradient in of_want)
    for gradient, expected in zip(of_got, of_want, strict=True):
        assert (gradient is None) == (expected is None)
        if gradient is not None:
            assert_same(gradient, expected, 1e-12)


def test_a_module_that_is_not_affine_runs_for_each_input() -> None:
    """A norm, and a whole block, whose other outputs and arguments stay as they are."""
    for targets, specimen in (("norm", "bert"), ("block", "bert"), ("block", "llama")):
        kit, batch = exact_kit(
            specimen, a=IA3(targets=f"in:{targets}", layers="0"), b=SSF(targets=f"in:{targets}", layers="0")
        )
        kit.base.config.use_cache = False
        path = kit["a"].sites[0].path
        module = kit.base.get_submodule(path)
        calls: list[Tensor] = []
        seen = module.register_forward_hook(lambda _, args, y, to=calls: to.extend((args[0], first(y))))
        values = []
        for entry in (None, "a", "b", Mix({"a": 0.7, "b": -0.4})):
            with kit.use(entry):
                run(kit, batch)
            values.append(calls.pop())
            calls.clear()
        seen.remove()
        f, a, b, mixed = values
        assert_same(mixed, f + 0.7 * (a - f) - 0.4 * (b - f), 1e-12)


def first(y: Any) -> Tensor:
    return y if isinstance(y, Tensor) else y[0]


def test_a_block_that_caches_is_not_run_twice() -> None:
    kit, batch = kit_with("llama", a=IA3(targets="in:block"), lora=LoRA())
    with kit.use(Mix({"a": 0.7, "lora": 0.3})):
        with pytest.raises(RouteError, match=r"DynamicCache, which may keep .* use_cache=False"):
            kit(**batch, use_cache=True)
        kit(**batch, use_cache=False)
    with kit.use(Mix({"a": 1.0, "lora": 0.3})):
        kit(**batch, use_cache=True)


def test_parameters_of_a_module_itself_and_its_output() -> None:
    """A transposed convolution is trained whole at its parameters; what rescales its output reads the frozen one's."""

    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up = nn.Linear(4, 6), nn.ConvTranspose1d(6, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.embed(x).transpose(1, 2))

    torch.manual_seed(0)
    x = torch.randn(2, 3, 4)
    kit = kitout.attach(Up(), roles={"embed$": "attn.qkv", "up$": "other"}, example_batch={"x": x})
    for name, method in (("full", FullFineTuning(targets="up")), ("gain", SSF(targets="up"))):
        put_on(kit, method, name)
    assert kit["full"].sites[0].port == "param"
    values = {}
    entry = Mix({"full": 0.5, "gain": -0.7})
    for each in (None, "full", "gain", entry):
        with kit.use(each):
            values[each] = run(kit, {"x": x})
    f = values[None]
    assert_same(values[entry], f + 0.5 * (values["full"] - f) - 0.7 * (values["gain"] - f), 1e-6)
    kit.merge(entry)
    assert_same(run(kit, {"x": x}), values[entry], 1e-6)
    kit.unmerge()
    with pytest.raises(NotMergeable, match="trained whole, in a Mix with an adapter"):
        kit.merge(Stack("gain", entry))


@pytest.mark.parametrize("specimen", ["llama", "vit"])
def test_rows_that_need_several_runs(specimen: str) -> None:
    kit, _ = exact_kit(specimen, **METHODS)
    rows = [
        Mix({"gain-in": 0.7, "ssf": 0.5, "lora-in": -0.2}),
        None,
        "gain-in",
        Stack("lora-in", Mix({"dora": 0.4, "ssf-in": 0.6})),
        Mix({"lora": 0.5, "bitfit": 0.5}),
    ]
    batch = {k: v.double() if v.is_floating_point() else v for k, v in ZOO[specimen].batch(5, 0).items()}
    with kit.use(rows):
        together = run(kit, batch)
    for i, entry in enumerate(rows):
        with kit.use(entry):
            assert_same(together[i : i + 1], run(kit, rows_of(batch, i)), 1e-12, what=str(entry))


@pytest.mark.parametrize("name", ["lora", "dora", "full", "gain-in", "houlsby"])
def test_one_part_of_weight_1_is_that_part(name: str) -> None:
    kit, batch = exact_kit("bert", **METHODS)
    nested = Mix({Mix({name: 0.5, "ssf": 2.0}): 2.0, "ssf": -4.0, "bitfit": 0})
    for strength in (1.0, 0.6):
        kit.strength(name, strength)
        with kit.use(name):
            alone = run(kit, batch)
        for entry in (Mix({name: 1}), Mix({name: 1, "ssf": 0, "bitfit": 0.0}), Stack(None, Mix({name: 1.0})), nested):
            with kit.use(entry):
                assert torch.equal(run(kit, batch), alone), entry
    with kit.use(Mix({name: 1, Stack(name): -1})):
        difference = run(kit, batch)
    with kit.use(None):
        assert torch.equal(difference, run(kit, batch))


def test_a_weight_of_0_leaves_a_part_out_wherever_it_is() -> None:
    """Prefixes, prompts, heads of another width, values that are not finite."""
    kit, batch = kit_with("bert", a=LoRA(), prefix=PrefixTuning(length=3), prompt=PromptTuning(length=2), nan=LoRA())
    kit.add("head", LoRA(rank=2), heads={"classifier": nn.Linear(kit.survey.towers[0].width, 1)})
    with torch.no_grad():
        next(kit["nan"].parameters()).fill_(float("nan"))
    with kit.use("a"):
        alone = run(kit, batch)
    for other in ("prefix", "prompt", "nan", "head"):
        entry = Mix({"a": 1, other: 0})
        with kit.use(entry):
            assert torch.equal(run(kit, batch), alone), other
        kit.merge(entry)
        assert_same(run(kit, batch), alone, what=other)
        kit.unmerge()


def test_simplified_entries() -> None:
    for entry, short in (
        (Stack("a", Stack("b", None), Mix({"c": 1})), Stack("a", "b", "c")),
        (Stack(Mix({"a": 0.0})), None),
        (Mix({"a": 0.5, Stack("a"): 0.25, "b": 0}), Mix({"a": 0.75})),
        (Mix({Mix({"a": 0.5, "b": 4}): 0.5, "a": 1}), Mix({"a": 1.25, "b": 2.0})),
        (Mix({Stack("a", Mix({"b": 1})): 2}), Mix({Stack("a", "b"): 2})),
    ):
        assert simplify(entry) == short
    assert simplify(Stack("a", Mix({"b": 1.0, "c": 2.0})), {"a", "b"}.__contains__) == Stack("a", "b")
