"""Each method's formula on random tensors, against a reference written here from the paper alone.

The Deltas are called directly (no model), in double precision; then whole models, where a formula says something about
every layer at once: SSF after every operation, IA3 after the activation, full fine-tuning against ordinary training.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kitout
from kitout import SSF, AdaptFormer, BitFit, FullFineTuning, Houlsby, LoRA, Method, PartialFineTuning, Pfeiffer
from kitout.base.site import Site
from kitout.methods.deltas.affine import ScaleShift
from kitout.methods.deltas.bottleneck import Bottleneck
from kitout.methods.deltas.dora import DoRADelta
from kitout.methods.deltas.low_rank import LowRankDelta
from kitout.methods.ia3 import ScaleDelta
from zoo import EXTRA, LENGTH, ZOO, Specimen, out

D, B, R = 12, 5, 3
SPECIES = {**ZOO, **EXTRA}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomized(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, p in enumerate(module.double().parameters()):
            p.copy_(rand(*p.shape, seed=100 + i))
    return module.eval()


# --- the maps ---------------------------------------------------------------------------------------------------------

X, Y = rand(2, 4, D, seed=1), rand(2, 4, D, seed=2)


def relu(t: Tensor) -> Tensor:
    return t * (t > 0)


def gelu(t: Tensor) -> Tensor:
    return t * 0.5 * (1 + torch.erf(t / math.sqrt(2)))


@pytest.mark.parametrize("scale", [1.0, 0.1, 4.0, "learned"])
@pytest.mark.parametrize(("activation", "act"), [("relu", relu), ("gelu", gelu)])
@pytest.mark.parametrize("reads", ["x", "y"])
def test_bottleneck(reads, activation, act, scale) -> None:
    delta = randomized(Bottleneck(D, B, reads=reads, activation=activation, scale=scale))
    v = X if reads == "x" else Y
    h = act(torch.einsum("btd,rd->btr", v, delta.down.weight) + delta.down.bias)
    s = delta.scale if scale == "learned" else scale
    expected = Y + s * (torch.einsum("btr,dr->btd", h, delta.up.weight) + delta.up.bias)
    torch.testing.assert_close(delta(X, Y), expected)


def test_dropout_lies_between_activation_and_up() -> None:
    delta = randomized(Bottleneck(D, B, reads="x", dropout=0.5)).train()
    with torch.no_grad():
        delta.up.weight.copy_(torch.eye(D, B))
        delta.up.bias.zero_()
        delta.down.bias.fill_(100.0)  # every unit is on: what is 0 was dropped
    h = (delta(X, Y) - Y)[..., :B]
    full = (X @ delta.down.weight.T + 100.0) * 2  # kept values are scaled by 1 / (1 - p)
    kept = h.abs() > 1e-9  # Y + h - Y leaves rounding where h is 0
    torch.testing.assert_close(h[kept], full[kept])
    assert 0.2 < kept.double().mean() < 0.8


def test_affine_and_its_fold() -> None:
    delta = randomized(ScaleShift(D))
    torch.testing.assert_close(delta(X, Y), Y * delta.scale + delta.shift)
    w, b = rand(D, 7, seed=3), rand(D, seed=4)
    x = rand(2, 7, seed=5)
    for bias in (b, None):
        new_w, new_b = delta.fold(w, bias)
        torch.testing.assert_close(F.linear(x, new_w, new_b), delta(x, F.linear(x, w, bias)))


def test_scale_and_its_fold() -> None:
    delta = randomized(ScaleDelta(D))
    torch.testing.assert_close(delta(X, Y), Y * delta.scale)
    w, b, x = rand(D, 7, seed=3), rand(D, seed=4), rand(2, 7, seed=5)
    torch.testing.assert_close(F.linear(x, *delta.fold(w, b)), delta(x, F.linear(x, w, b)))


def test_low_rank_and_its_fold() -> None:
    a, b, w, bias = rand(R, D, seed=1), rand(7, R, seed=2), rand(7, D, seed=3), rand(7, seed=4)
    delta = LowRankDelta(a, b, scale=1.7).double()
    y = F.linear(X, w, bias)
    torch.testing.assert_close(delta(X, y), y + 1.7 * X @ a.T @ b.T)
    torch.testing.assert_close(F.linear(X, *delta.fold(w, bias)), delta(X, y))


def test_dora_with_bias_and_its_detached_norm() -> None:
    linear = nn.Linear(D, 7).double().requires_grad_(False)
    site = Site(path="l", role="attn.q", d_in=D, d_out=7, module=linear)
    a, b, m = rand(R, D, seed=1), rand(7, R, seed=2), rand(7, seed=3).abs()
    delta = DoRADelta(a, b, m, scale=1.7).double()
    from kitout.base.weights import FrozenModule

    y = delta(X, linear(X), FrozenModule(site))
    v = linear.weight + 1.7 * b @ a
    torch.testing.assert_close(y, X @ (m[:, None] * v / v.norm(dim=1, keepdim=True)).T + linear.bias)
    y.square().sum().backward()
    # The same function with the norm taken as a constant (paper, section 4.3) gives the same gradient.
    a2, b2 = a.clone().requires_grad_(), b.clone().requires_grad_()
    v2 = linear.weight + 1.7 * b2 @ a2
    y2 = X @ (m[:, None] * v2 / v2.detach().norm(dim=1, keepdim=True)).T + linear.bias
    y2.square().sum().backward()
    torch.testing.assert_close(delta.a.grad, a2.grad)
    torch.testing.assert_close(delta.b.grad, b2.grad)


# --- how they start ---------------------------------------------------------------------------------------------------


def starts(kit: kitout.Kit, method: Method) -> dict[str, Tensor]:
    adapter = kit.add("a", method, seed=0)
    values: dict[str, list[Tensor]] = {}
    for name, p in adapter.named_parameters():
        values.setdefault(name.split(".", 2)[2], []).append(p.detach().flatten())
    kit.remove("a")
    return {name: torch.cat(v) for name, v in values.items()}


def test_initial_values_follow_the_papers() -> None:
    kit = kitout.attach(ZOO["vit"].build())
    houlsby = starts(kit, Houlsby(width=40, norms=False))
    for part in ("down", "up"):
        w = houlsby[f"{part}.weight"]
        assert w.abs().max() <= 2e-3  # cut at two standard deviations
        assert w.std() == pytest.approx(0.88e-3, rel=0.05)  # what a normal cut there has left
        assert not houlsby[f"{part}.bias"].any()
    pfeiffer = starts(kit, Pfeiffer(width=40))
    assert pfeiffer["down.weight"].std() == pytest.approx(0.01, rel=0.05)
    assert pfeiffer["up.weight"].std() == pytest.approx(0.01, rel=0.05)
    assert not pfeiffer["up.bias"].any()
    former = starts(kit, AdaptFormer(width=40, scale="learned"))
    bound = 1 / math.sqrt(48)  # kaiming_uniform(a = sqrt 5)
    assert former["down.weight"].abs().max() == pytest.approx(bound, rel=0.01)
    assert former["down.weight"].std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not former["up.weight"].any()
    assert not former["down.bias"].any()
    assert former["scale"].tolist() == [1.0] * 3
    ssf = starts(kit, SSF())
    assert ssf["scale"].mean() == pytest.approx(1.0, abs=0.003)
    assert ssf["scale"].std() == pytest.approx(0.02, rel=0.1)
    assert ssf["shift"].mean() == pytest.approx(0.0, abs=0.003)
    assert ssf["shift"].std() == pytest.approx(0.02, rel=0.1)
    assert set(starts(kit, SSF(std=0.0))["scale"].tolist()) == {1.0}


# --- whole models -----------------------------------------------------------------------------------------------------


def randomise_adapter(adapter: nn.Module, seed: int = 3, spread: float = 0.2) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=draw), alpha=spread)


@torch.no_grad()
def test_ssf_scales_and_shifts_after_every_operation() -> None:
    """A vision transformer written out, with s * y + t after patch embedding, norms and projections."""
    specimen = ZOO["vit"]
    kit = kitout.attach(specimen.build())
    randomise_adapter(kit.add("a", SSF(), seed=0))
    kit.use("a")
    w = specimen.build().state_dict()
    delta = {s.path: kit["a"].delta(s) for s in kit["a"].sites}

    def ssf(path: str, y: Tensor) -> Tensor:
        return y * delta[path].scale + delta.pop(path).shift

    def linear(path: str, x: Tensor) -> Tensor:
        return ssf(path, x @ w[f"{path}.weight"].T + w[f"{path}.bias"])

    def norm(path: str, x: Tensor) -> Tensor:
        n = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-12).sqrt()
        return ssf(path, n * w[f"{path}.weight"] + w[f"{path}.bias"])

    pixels = specimen.batch(2, 0)["pixel_values"]
    stem = "vit.embeddings.patch_embeddings.projection"
    patches = F.conv2d(pixels, w[f"{stem}.weight"], w[f"{stem}.bias"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat((w["vit.embeddings.cls_token"].expand(2, -1, -1), ssf(stem, patches)), 1)
    x = x + w["vit.embeddings.position_embeddings"]
    for i in range(3):
        path = f"vit.layers.{i}"
        h = norm(f"{path}.layernorm_before", x)
        q, k, v = (linear(f"{path}.attention.{p}_proj", h).unflatten(-1, (4, 12)).transpose(1, 2) for p in "qkv")
        a = torch.softmax(q @ k.transpose(2, 3) / 12**0.5, -1) @ v
        x = x + linear(f"{path}.attention.o_proj", a.transpose(1, 2).flatten(2))
        h = gelu(linear(f"{path}.mlp.fc1", norm(f"{path}.layernorm_after", x)))
        x = x + linear(f"{path}.mlp.fc2", h)
    x = norm("vit.layernorm", x)
    logits = x[:, 0] @ w["classifier.weight"].T + w["classifier.bias"]
    assert not delta, f"SSF sits where the paper has nothing: {sorted(delta)}"
    torch.testing.assert_close(out(kit(pixel_values=pixels)), logits, atol=1e-5, rtol=1e-5)


def test_ssf_leaves_poolers_heads_and_tables_alone() -> None:
    def paths(name: str) -> set[str]:
        return {s.path for s in SSF().sites(kitout.attach(SPECIES[name].build()).survey)}

    def leaves(name: str, *kinds: type) -> set[str]:
        return {n for n, m in SPECIES[name].build().named_modules() if isinstance(m, kinds)}

    assert paths("bert") == leaves("bert", nn.Linear, nn.LayerNorm) - {"bert.pooler.dense", "classifier"}
    assert paths("swin") == leaves("swin", nn.Linear, nn.LayerNorm, nn.Conv2d) - {"classifier"}  # patch merging too
    assert paths("timm-vit") == leaves("timm-vit", nn.Linear, nn.LayerNorm, nn.Conv2d) - {"head"}


@torch.no_grad()
def test_ssf_scales_channels_and_not_columns() -> None:
    """A convolution's output as wide as it has channels: [B, C, H, C]."""
    kit = kitout.attach(ZOO["swin"].build())
    adapter = kit.add("a", SSF(targets="patch"), seed=0)
    randomise_adapter(adapter)
    (site,) = adapter.sites
    conv, pixels = site.module, torch.randn(1, 3, 96, 96)  # 24 channels, 24 x 24 patches
    plain = F.conv2d(pixels, conv.weight, conv.bias, conv.stride)
    assert plain.shape == (1, 24, 24, 24)
    d = adapter.delta(site)
    expected = plain * d.scale[None, :, None, None] + d.shift[None, :, None, None]
    kit.use("a")
    torch.testing.assert_close(conv(pixels), expected)


@torch.no_grad()
def test_ia3_paper_scales_after_the_activation_and_never_q() -> None:
    specimen = ZOO["bert"]
    kit = kitout.attach(specimen.build())
    adapter = kit.add("a", kitout.IA3(), seed=0)
    randomise_adapter(adapter)
    held = {(s.role, s.port): adapter.delta(s).scale for s in adapter.sites if s.layer == 0}
    assert {k: v.numel() for k, v in held.items()} == {
        ("attn.k", "out"): 48, ("attn.v", "out"): 48, ("mlp.down", "in"): 80,
    }  # fmt: skip
    layer = kit.base.get_submodule("bert.encoder.layer.0")
    x = torch.randn(2, 5, 48)
    kit.use("a")
    torch.testing.assert_close(layer.attention.self.query(x), F.linear(x, *layer.attention.self.query.parameters()))
    for part in ("key", "value"):
        m = getattr(layer.attention.self, part)
        l = held[f"attn.{part[0]}", "out"]  # noqa: E741 - the paper's letter
        torch.testing.assert_close(m(x), l * (x @ m.weight.T + m.bias))
    w1, w2 = layer.intermediate.dense, layer.output.dense
    ff = w2(layer.intermediate(x))
    l = held["mlp.down", "in"]  # noqa: E741
    torch.testing.assert_close(ff, (l * gelu(x @ w1.weight.T + w1.bias)) @ w2.weight.T + w2.bias, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_houlsby_trains_every_norm_as_its_own_gain_and_shift() -> None:
    """Norm deltas alone (the bottlenecks give nothing): the model with those gains and shifts in its own norms."""
    specimen = ZOO["bert"]
    kit, bare = kitout.attach(specimen.build()), specimen.build()
    adapter = kit.add("a", Houlsby(width=3), seed=0)
    randomise_adapter(adapter)
    norms = 0
    for site in adapter.sites:
        delta = adapter.delta(site)
        if isinstance(delta, Bottleneck):
            delta.up.weight.zero_()
            delta.up.bias.zero_()
            continue
        module, norms = bare.get_submodule(site.path), norms + 1
        assert isinstance(module, nn.LayerNorm)
        module.weight.mul_(delta.scale)
        module.bias.mul_(delta.scale).add_(delta.shift)
    assert norms == 7  # two per block and the embeddings'
    batch = specimen.batch(2, 0)
    kit.use("a")
    torch.testing.assert_close(out(kit(**batch)), out(bare(**batch)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_serial_adapters_with_nothing_to_add_are_the_base_bit_for_bit() -> None:
    for method in (Houlsby(width=3), Pfeiffer(width=3)):
        for name in ("bert", "llama", "vit", "gpt-neox"):
            specimen = ZOO[name]
            kit = kitout.attach(specimen.build())
            for site in (adapter := kit.add("a", method, seed=0)).sites:
                if isinstance(adapter.delta(site), Bottleneck):
                    adapter.delta(site).up.weight.zero_()
            batch = specimen.batch(2, 0)
            base = out(kit(**batch))
            kit.use("a")
            assert torch.equal(out(kit(**batch)), base), f"{type(method).__name__} on {name}"


# --- full and partial fine-tuning -------------------------------------------------------------------------------------


def trained(model: nn.Module, parameters: list[nn.Parameter], batch, optimizer, steps: int = 2) -> None:
    step = optimizer(parameters)
    for i in range(steps):
        step.zero_grad()
        logits = out(model(**batch))
        goal = torch.randn(logits.shape, generator=torch.Generator().manual_seed(i))
        (logits - goal).square().mean().backward()
        step.step()


OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-3, weight_decay=0.1),  # eps: no division by rounding noise
}


@pytest.mark.parametrize("optimizer", OPTIMISERS.values(), ids=OPTIMISERS.keys())
@pytest.mark.parametrize("specimen", SPECIES.values(), ids=SPECIES.keys())
def test_full_fine_tuning_is_ordinary_fine_tuning(specimen: Specimen, optimizer) -> None:
    """Two steps on a kit and two on the bare model give the same weights, whatever is tied or belongs to no leaf."""
    batch = specimen.batch(3, 0)
    bare, kit = specimen.build(), kitout.attach(specimen.build())
    base_before = copy.deepcopy(kit.base.state_dict())
    adapter = kit.add("a", FullFineTuning())
    kit.use("a")
    assert torch.equal(out(kit(**batch)), out(bare(**batch)))  # a learning rate of 0
    trained(bare, list(bare.parameters()), batch, optimizer)
    trained(kit, list(adapter.parameters()), batch, optimizer)
    for key, value in kit.base.state_dict().items():
        assert torch.equal(value, base_before[key]), f"the base's {key} moved"
    kit.merge("a")
    expected, got = bare.state_dict(), kit.base.state_dict()
    moved = 0
    for key, value in expected.items():
        assert (got[key] - value).abs().max() <= 1e-6, key
        moved += int(not torch.equal(value, base_before[key]))
    assert moved > len([p for p in bare.parameters() if p.grad is not None]) * 0.8


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "timm-vit", "bart"])
def test_bitfit_is_training_the_biases(name: str) -> None:
    specimen = SPECIES[name]
    batch, bare, kit = specimen.batch(3, 0), specimen.build(), kitout.attach(specimen.build())
    adapter = kit.add("a", BitFit())
    heads = {s.path for s in kit.survey.sites if s.role == "head"}
    chosen = {n for n, _ in bare.named_parameters() if n.endswith("bias") and n.rpartition(".")[0] not in heads}
    bare.requires_grad_(False)
    for n, p in bare.named_parameters():
        p.requires_grad_(n in chosen)
    trained(bare, [p for p in bare.parameters() if p.requires_grad], batch, OPTIMISERS["sgd"])
    kit.use("a")
    trained(kit, list(adapter.parameters()), batch, OPTIMISERS["sgd"])
    kit.merge("a")
    start = specimen.build().state_dict()
    for n, p in bare.named_parameters():
        assert (kit.base.get_parameter(n) - p).abs().max() <= 1e-6, n
        assert torch.equal(p, start[n]) or n in chosen
    assert sum(not torch.equal(p, start[n]) for n, p in bare.named_parameters()) > 0.8 * len(chosen)


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "t5", "bart", "falcon"])
def test_tied_tables_are_one_trained_tensor_and_stay_tied(name: str) -> None:
    specimen = SPECIES[name]
    model = specimen.build()
    ties: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for n, p in module._parameters.items():
            ties.setdefault(id(p), []).append(f"{path}.{n}")
    shared = [set(names) for i, names in ties.items() if i != id(None) and len(names) > 1]
    assert shared
    kit = kitout.attach(model)
    adapter = kit.add("a", FullFineTuning())
    assert kit.num_parameters("a").total == sum(p.numel() for p in model.parameters())
    randomise_adapter(adapter, spread=0.05)
    with torch.no_grad(), kit.use("a"):
        active = out(kit(**specimen.batch(2, 0)))
    plain = kit.merged_copy("a")
    by_id: dict[int, set[str]] = {}
    for path, module in plain.named_modules():
        for n, p in module._parameters.items():
            if p is not None:
                by_id.setdefault(id(p), set()).add(f"{path}.{n}")
    assert [names for names in by_id.values() if len(names) > 1] == shared
    with torch.no_grad():
        torch.testing.assert_close(out(plain(**specimen.batch(2, 0))), active, atol=1e-5, rtol=1e-5)
    assert plain.config.tie_word_embeddings


def test_a_trained_head_of_a_tied_model_leaves_its_table_alone(tmp_path) -> None:
    for name in ("gpt2", "t5", "bart"):
        specimen = SPECIES[name]
        kit = kitout.attach(specimen.build())
        randomise_adapter(kit.add("a", PartialFineTuning(part="head")))
        with torch.no_grad(), kit.use("a"):
            active = out(kit(**specimen.batch(2, 0)))
        plain = kit.merged_copy("a")
        plain.save_pretrained(tmp_path / name)
        again = type(plain).from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            for model in (plain, again):
                torch.testing.assert_close(out(model(**specimen.batch(2, 0))), active, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "bart", "roberta", "falcon", "distilbert"])
@torch.no_grad()
def test_rows_may_each_have_their_own_full_copy(name: str) -> None:
    specimen = SPECIES[name]
    kit, batch = kitout.attach(specimen.build()), specimen.batch(4, 0)
    for i, adapter in enumerate((kit.add("a", FullFineTuning()), kit.add("b", PartialFineTuning(last=1)))):
        randomise_adapter(adapter, seed=i, spread=0.1)
    alone = {}
    for active in ("a", "b", None):
        with kit.use(active):
            alone[active] = out(kit(**batch))
    with kit.use(["a", None, "b", "a"]):
        mixed = out(kit(**batch))
    for row, active in enumerate(("a", None, "b", "a")):
        torch.testing.assert_close(mixed[row], alone[active][row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "named"),
    [("vit", "cls_token"), ("timm-vit", "cls_token"), ("mixtral", "gate_up_proj"), ("t5", "relative")],
)
@torch.no_grad()
def test_rows_with_bare_parameters_of_their_own_are_refused_by_name(name: str, named: str) -> None:
    specimen = SPECIES[name]
    rows = LENGTH if name == "t5" else 2  # as many rows as tokens: the table of positions looks like a batch
    kit, batch = kitout.attach(specimen.build()), specimen.batch(rows, 0)
    if name == "t5":
        batch["decoder_input_ids"] = batch["input_ids"]
    kit.add("a", FullFineTuning(targets="*" if name != "mixtral" else "*experts"))

    def run_by_row() -> None:  # refused at use where it can be reason, else at the call
        kit.use(["a", *[None] * (rows - 1)])
        kit(**batch)

    with pytest.raises(kitout.errors.RouteError, match=named):
        run_by_row()
    with kit.use(None):
        base = out(kit(**batch))
    with kit.use(["a"] * rows):  # one adapter for the whole batch after all
        assert torch.equal(out(kit(**batch)), base)


@torch.no_grad()
def test_strength_and_mix_go_between_the_parameters() -> None:
    """Bare parameters follow strength and Mix as values do: half way is half way for the merged weights too."""
    for name in ("timm-vit", "swin", "mixtral"):
        specimen = SPECIES[name]
        kit, batch = kitout.attach(specimen.build()), specimen.batch(2, 0)
        for i, n in enumerate("ab"):
            randomise_adapter(kit.add(n, FullFineTuning()), seed=i, spread=0.05)
        kit.strength("a", 0.3)
        with kit.use("a"):
            active = out(kit(**batch))
        torch.testing.assert_close(
            out(
                kit.merged_copy(
                    "a",
                )(**batch)
            ),
            active,
            atol=1e-5,
            rtol=1e-5,
        )
        kit.strength("a", 1.0)
        by_hand = specimen.build()
        start = {n: p.clone() for n, p in by_hand.named_parameters()}
        own = {n: kit.merged_copy(n).state_dict() for n in "ab"}
        for n, p in by_hand.named_parameters():
            p.copy_(start[n] + 0.6 * (own["a"][n] - start[n]) - 0.2 * (own["b"][n] - start[n]))
        with kit.use(kitout.Mix({"a": 0.6, "b": -0.2})):
            mixed = out(kit(**batch))
        torch.testing.assert_close(mixed, out(by_hand(**batch)), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_stack_over_a_full_copy_is_its_merge() -> None:
    """A copy takes the place of what is below it at its module, also where it copies the bias alone."""
    names = PartialFineTuning(names="*query.bias *LayerNorm.bias")
    specimen = ZOO["bert"]
    kit, batch = kitout.attach(specimen.build()), specimen.batch(2, 0)
    for i, (n, m) in enumerate(
        {"f": FullFineTuning(), "l": LoRA(rank=2), "b": BitFit(), "s": SSF(), "n": names}.items()
    ):
        randomise_adapter(kit.add(n, m), seed=i, spread=0.1)
    for order in (("f", "l"), ("l", "f"), ("b", "f", "s"), ("f", "s"), ("s", "b", "l"), ("l", "n"), ("s", "n")):
        with kit.use(kitout.Stack(*order)):
            active = out(kit(**batch))
        torch.testing.assert_close(out(kit.merged_copy(*order)(**batch)), active, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bart", "opt", "gpt2"])
@torch.no_grad()
def test_a_copied_table_is_asked_with_everything_its_module_is_asked_with(name: str) -> None:
    """Position tables take the length of the cache as a second argument; rows have copies of their own."""
    specimen = SPECIES[name]
    kit, batch = kitout.attach(specimen.build()), specimen.batch(3, 0)
    randomise_adapter(kit.add("a", FullFineTuning()), spread=0.1)
    batch.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

    def scores(model) -> Tensor:
        made = model.generate(**batch, **settings, output_scores=True, return_dict_in_generate=True)
        return torch.stack(made.scores, 1)

    plain, bare = scores(kit.merged_copy("a")), scores(specimen.build())
    with kit.use("a"):
        torch.testing.assert_close(scores(kit), plain, atol=1e-4, rtol=1e-4)
    with kit.use(["a", None, "a"]):
        mixed = scores(kit)
    for row, alone in enumerate((plain, bare, plain)):
        torch.testing.assert_close(mixed[row], alone[row], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_copy_is_called_with_every_argument() -> None:
    class Table(nn.Embedding):
        def forward(self, ids: Tensor, offset: Tensor, times: float = 1.0) -> Tensor:
            return super().forward(ids + offset) * times

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
            self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))
            return x + self.down(F.relu(self.up(x)))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.blocks = Table(20, 8), nn.ModuleList([Block(), Block()])

        def forward(self, ids: Tensor, offset: Tensor) -> Tensor:
            x = self.table(ids, offset, times=3.0)
            for block in self.blocks:
                x = block(x)
            return x

    bare, batch = Model(), {"ids": torch.randint(0, 9, (3, 4)), "offset": torch.tensor([[1], [5], [9]])}
    kit = kitout.attach(copy.deepcopy(bare), example_batch=batch)
    randomise_adapter(kit.add("a", FullFineTuning()))
    active = kit.merged_copy("a")(**batch)
    with kit.use("a"):
        torch.testing.assert_close(kit(**batch), active)
    with kit.use([None, "a", None]):
        torch.testing.assert_close(kit(**batch), torch.stack([bare(**batch)[0], active[1], bare(**batch)[2]]))


def test_partial_takes_exactly_what_it_says() -> None:
    def names(specimen: str, **choice) -> set[str]:
        kit = kitout.attach(SPECIES[specimen].build())
        sites = kit.add("a", PartialFineTuning(**choice)).sites
        return {f"{s.path}.{n}" if s.path else n for s in sites for n in s.parameter_names}

    def under(specimen: str, *starts: str) -> set[str]:
        model = SPECIES[specimen].build()
        return {n for n, _ in model.named_parameters(remove_duplicate=False) if n.startswith(starts)}

    assert names("vit", last=1) == under("vit", "vit.layers.2.", "vit.layernorm.")
    assert names("timm-vit", last=2) == under("timm-vit", "blocks.1.", "blocks.2.", "norm.")
    assert names("llama", last=1) == under("llama", "model.layers.1.", "model.norm.")
    assert names("bert", last=3) == under("bert", "bert.encoder.layer.")  # post-norm: no final norm of its own
    assert names("gpt2", last=1) == under("gpt2", "transformer.h.1.", "transformer.ln_f.")
    assert names("opt", last=1) == under("opt", "model.decoder.layers.1.", "model.decoder.final_layer_norm.")
    both = ("encoder.block.1.", "encoder.final", "decoder.block.1.", "decoder.final")
    assert names("t5", last=1) == under("t5", *both)
    assert names("bart", last=1) == under("bart", "model.encoder.layers.1.", "model.decoder.layers.2.")
    assert names("swin", last=1) == under("swin", "swin.encoder.layers.1.blocks.1.", "swin.layernorm.")
    assert names("vit", part="head") == under("vit", "classifier.")
    assert names("vit", part="norms") == {n for n in under("vit", "") if "layernorm" in n}
    assert names("gpt2", names="*.bias transformer.wpe.*") == {
        n for n in under("gpt2", "") if n.endswith(".bias") or ".wpe." in n
    }


def test_what_no_forward_reads_is_not_trained() -> None:
    kit = kitout.attach(ZOO["dinov2"].build())
    held = {n for s in kit.add("a", FullFineTuning()).sites for n in s.parameter_names}
    assert "cls_token" in held
    assert "mask_token" not in held  # only masked-image training reads it


def test_non_trainable_parameters_stay_so() -> None:
    """A table of sines without a gradient; a model frozen as a whole says nothing about any of its parameters."""

    def held(model: nn.Module, method: Method) -> set[str]:
        return {s.path for s in kitout.attach(model).add("a", method).sites}

    model = ZOO["gpt2"].build()
    everything = held(ZOO["gpt2"].build(), FullFineTuning())
    model.transformer.wpe.requires_grad_(False)
    assert held(model, FullFineTuning()) == everything - {"transformer.wpe"}
    model = ZOO["gpt2"].build()
    model.transformer.wpe.requires_grad_(False)
    assert held(model, PartialFineTuning(names="*wpe*")) == {"transformer.wpe"}  # asked for by name
    assert held(ZOO["gpt2"].build().requires_grad_(False), FullFineTuning()) == everything


def test_modules_whose_parameters_others_read_are_trained_through_them() -> None:
    """torch's own attention keeps q, k, v in a bare parameter and never calls its output projection."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
            self.layers = nn.ModuleList([layer, copy.deepcopy(layer)])
            self.top = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.top(x)

    torch.manual_seed(0)
    bare = Model()
    kit, x = (
        kitout.attach(copy.deepcopy(bare), example_batch={"x": torch.randn(2, 4, 16)}),
        {"x": torch.randn(2, 4, 16)},
    )
    adapter = kit.add("a", FullFineTuning())
    assert kit.num_parameters("a").total == sum(p.numel() for p in bare.parameters())
    kit.use("a")
    kit.train()
    trained(bare, list(bare.parameters()), x, OPTIMISERS["sgd"])
    trained(kit, list(adapter.parameters()), x, OPTIMISERS["sgd"])
    kit.merge("a")
    for key, value in bare.state_dict().items():
        assert (kit.base.state_dict()[key] - value).abs().max() <= 1e-6, key


def test_full_fine_tuning_leaves_replaced_heads_to_their_replacement() -> None:
    kit = kitout.attach(ZOO["bert"].build())
    adapter = kit.add("a", FullFineTuning(), heads={"classifier": nn.Linear(48, 7)})
    assert "classifier" not in {s.path for s in adapter.sites}
    with kit.use("a"):
        out(kit(**ZOO["bert"].batch(2, 0))).square().sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_copies_cost_no_second_product() -> None:
    """A whole batch with an active copy runs the copy only."""
    kit = kitout.attach(ZOO["llama"].build())
    kit.add("a", FullFineTuning(targets="mlp.down"))
    kit.use("a")
    batch = ZOO["llama"].batch(2, 0)
    with torch.profiler.profile() as active, torch.no_grad():
        kit(**batch)
    kit.use(None)
    with torch.profiler.profile() as base, torch.no_grad():
        kit(**batch)

    def products(profile) -> int:
        return sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm"))

    assert products(active) == products(base) > 0
