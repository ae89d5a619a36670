"""kitout's own folders: what is written comes back bit for bit, on the same base only, whole or not at all."""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import kitout
from kitout import IA3, MAM, VPT, BitFit, FullFineTuning, LoRA, PartialFineTuning
from kitout.errors import AdapterExists, FileError, MergeStateError, UnknownAdapter, WrongBase
from kitout.files import adapter_folder, atomic
from kitout.method import registered_methods
from laws.activate import fresh_kit
from zoo import ZOO, out

BATCH = ZOO["llama"].batch(2, 0)


def randomize(module: nn.Module, seed: int = 3) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted(module.named_parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=draw).to(p.dtype))


def attached(species: str = "llama") -> kitout.Kit:
    return fresh_kit(ZOO[species])


def with_adapter(method: kitout.Method | None = None, species: str = "llama", **how: Any) -> kitout.Kit:
    """A kit whose adapter "a" looks trained."""
    kit = attached(species)
    kit.add("a", method or LoRA(rank=4, alpha=6), **how)
    randomize(kit["a"])
    return kit


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def listed(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter.json").read_text())


OPTIONS = [
    *(
        pytest.param(cls(), id=cls.__name__)
        for cls in registered_methods()
        if cls not in (PartialFineTuning, VPT) and ".compositions." not in cls.__module__
    ),
    pytest.param(MAM(prefix=4, width=3), id="MAM"),
    pytest.param(LoRA(rank={"attn.*": 4, "mlp.*": 2}, alpha=3, targets="attn.q mlp.up"), id="rank by role"),
    pytest.param(LoRA(dora=True, rank=4), id="dora"),
    pytest.param(LoRA(init="pissa", rank=4), id="pissa"),
    pytest.param(LoRA(targets="embed head", rank=4), id="tables"),
    pytest.param(PartialFineTuning(last=1), id="last layer"),
    pytest.param(FullFineTuning(layers="1"), id="full, one layer"),
]


PLACES = [pytest.param(s, *o.values, id=f"{s}-{o.id}") for s in ("llama", "bert", "gpt2", "t5") for o in OPTIONS]


@pytest.mark.parametrize(
    ("species", "method"),
    [
        *PLACES,
        pytest.param("vit", VPT(), id="vit-VPT"),
        pytest.param("vit", VPT(deep=True, projection=4), id="vit-deep"),
    ],
)
def test_every_method_comes_back_bit_for_bit(species: str, method: kitout.Method, tmp_path: Path) -> None:
    kit = with_adapter(method, species, seed=7)
    kit.save("a", tmp_path / "a")
    other = attached(species)
    state = torch.get_rng_state()
    loaded = other.load(tmp_path / "a", name="b")
    assert torch.equal(torch.get_rng_state(), state)
    assert same_bits(kit["a"], loaded)
    assert (loaded.method, loaded.seed, loaded.name) == (method, 7, "b")
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in kit["a"].parameters()]
    kit.use("a")
    other.use("b")
    with torch.no_grad():
        batch = ZOO[species].batch(2, 0)
        assert torch.equal(out(kit(**batch)), out(other(**batch)))


def test_pissa_counts_from_where_it_started(tmp_path: Path) -> None:
    kit = with_adapter(LoRA(init="pissa", rank=4))
    kit.save("a", tmp_path / "a")
    assert any(key.endswith(".a0") for key in load_file(tmp_path / "a" / "adapter.safetensors"))


def test_tensor_names_are_readable(tmp_path: Path) -> None:
    kit = with_adapter(LoRA(targets="attn.q"), heads={"lm_head": nn.Linear(48, 7)})
    kit.save("a", tmp_path / "a")
    assert sorted(load_file(tmp_path / "a" / "adapter.safetensors")) == [
        "@head/lm_head.bias",
        "@head/lm_head.weight",
        *(f"model/layers/{i}/self_attn/q_proj.{x}" for i in (0, 1) for x in "ab"),
    ]


def test_the_record_says_what_the_adapter_is(tmp_path: Path) -> None:
    kit = with_adapter(LoRA(rank=4, targets="attn.q", layers="1"), seed=3)
    kit.strength("a", 0.25)
    kit.save("a", tmp_path / "a", metadata={"data": ["tweets"], "lr": 1e-3})
    record = record_of(tmp_path / "a")
    assert {k: record[k] for k in ("format", "name", "method", "seed", "strength", "dtype", "note", "heads")} == {
        "format": 1,
        "name": "a",
        "method": "LoRA",
        "seed": 3,
        "strength": 0.25,
        "dtype": "float32",
        "note": {"data": ["tweets"], "lr": 1e-3},
        "heads": [],
    }
    assert record["parameters"] == kit.num_parameters("a").total
    assert record["sites"] == [
        {
            "key": "model/layers/1/self_attn/q_proj",
            "path": "model.layers.1.self_attn.q_proj",
            "role": "attn.q",
            "port": "out",
            "d_in": 48,
            "d_out": 48,
        }
    ]
    other = attached()
    loaded = other.load(tmp_path / "a")
    assert (loaded.name, loaded.strength, loaded.metadata) == ("a", 0.25, {"data": ["tweets"], "lr": 1e-3})
    other.save("a", tmp_path / "again")
    assert record_of(tmp_path / "again") == record


def test_channels_of_a_fused_projection(tmp_path: Path) -> None:
    kit = with_adapter(LoRA(rank=4, targets="attn.q attn.v"), "gpt-neox")
    kit.save("a", tmp_path / "a")
    q = next(s for s in record_of(tmp_path / "a")["sites"] if s["role"] == "attn.q")
    assert q["channels"] == [[36 * h, 36 * h + 12] for h in range(4)]  # interleaved head by head
    assert same_bits(attached("gpt-neox").load(tmp_path / "a"), kit["a"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    kit = with_adapter(dtype=dtype)
    kit.save("a", tmp_path / "a")
    loaded = attached().load(tmp_path / "a")
    assert same_bits(kit["a"], loaded)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    randomly = next(kit["a"].parameters())
    randomly.data = randomly.data.float()
    kit.save("a", tmp_path / "a")
    assert same_bits(kit["a"], attached().load(tmp_path / "a"))


def test_a_loaded_adapter_trains(tmp_path: Path) -> None:
    with_adapter().save("a", tmp_path / "a")
    kit = attached()
    before = copy.deepcopy(kit.load(tmp_path / "a"))
    kit.use("a")
    optimizer = torch.optim.SGD(kit.parameters(), lr=1.0)
    out(kit(**BATCH)).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip(before.parameters(), kit["a"].parameters(), strict=True))


# --- full copies are kept as differences -----------------------------------------------------------------------------


def test_an_untrained_copy_is_all_zeros(tmp_path: Path) -> None:
    kit = attached()
    kit.add("a", FullFineTuning())
    kit.save("a", tmp_path / "a")
    assert all(not t.any() for t in load_file(tmp_path / "a" / "adapter.safetensors").values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_copy_whose_float_difference_would_lose_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    kit = attached()
    kit.add("a", FullFineTuning(targets="attn.q"), dtype=dtype)
    for p in kit["a"].parameters():
        p.data.flatten()[::7] *= 1e-6  # far below the last digit of what it started from
        p.data.flatten()[3], p.data.flatten()[4], p.data.flatten()[5] = -0.0, 0.0, torch.finfo(dtype).max
    kit.save("a", tmp_path / "a")
    loaded = attached().load(tmp_path / "a")
    assert same_bits(kit["a"], loaded)
    assert all(torch.signbit(p.flatten()[3]) for p in loaded.parameters())


def test_a_copy_on_a_rounded_base_is_off_by_that_rounding(tmp_path: Path) -> None:
    kit = with_adapter(FullFineTuning(targets="attn.q"))
    kit.save("a", tmp_path / "a")
    loaded = kitout.attach(ZOO["llama"].build().bfloat16()).load(tmp_path / "a")
    for p, q in zip(kit["a"].parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2**-7, atol=0)


def test_a_copy_of_mixed_dtypes_says_so(tmp_path: Path) -> None:
    kit = attached()
    kit.add("a", FullFineTuning(targets="attn.q"))
    first = next(kit["a"].parameters())
    first.data = first.data.half()
    with pytest.raises(FileError, match=r"several dtypes.*float\(\)"):
        kit.save("a", tmp_path / "a")


def test_saving_while_merged_takes_the_difference_from_the_unmerged_base(tmp_path: Path) -> None:
    kit = with_adapter(FullFineTuning(targets="attn.q"))
    kit.merge("a")
    kit.save("a", tmp_path / "a")
    assert same_bits(attached().load(tmp_path / "a"), kit["a"])
    with pytest.raises(MergeStateError, match="unmerge"):
        kit.load(tmp_path / "a", name="b")


# --- names and folders -----------------------------------------------------------------------------------------------


def test_names(tmp_path: Path) -> None:
    kit = with_adapter()
    kit.save("a", tmp_path / "a")
    with pytest.raises(AdapterExists, match="'a'"):
        kit.load(tmp_path / "a")
    kit.load(tmp_path / "a", name="b")
    assert kit.names == ["a", "b"]
    with pytest.raises(UnknownAdapter):
        kit.save("c", tmp_path / "c")


def test_a_saved_folder_replaces_an_adapter_folder_and_nothing_else(tmp_path: Path) -> None:
    kit = with_adapter()
    (tmp_path / "empty").mkdir()
    kit.save("a", tmp_path / "empty")
    kit.save("a", tmp_path / "new" / "deeper" / "a")
    first = record_of(tmp_path / "empty")
    randomize(kit["a"], seed=9)
    kit.save("a", tmp_path / "empty")
    assert record_of(tmp_path / "empty")["tensors"] != first["tensors"]
    (tmp_path / "empty" / "thesis.tex").write_text("dear")
    with pytest.raises(FileError, match=r"also holds thesis\.tex"):
        kit.save("a", tmp_path / "empty")
    with pytest.raises(FileError, match="is a file"):
        kit.save("a", tmp_path / "empty" / "thesis.tex")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "x").write_text("")
    with pytest.raises(FileError, match="is a folder of something else: it holds x, which replacing it would delete"):
        kit.save("a", tmp_path / "else")
    assert (tmp_path / "empty" / "thesis.tex").read_text() == "dear"
    assert listed(tmp_path) == ["else", "empty", "new"]


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    kit = with_adapter()
    kit.save("a", tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    randomize(kit["a"], seed=9)
    kit.save("a", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert same_bits(attached().load(tmp_path / "real"), kit["a"])


def _fail(*_: Any, **__: Any) -> Any:
    raise OSError("the disk is full")


BREAKS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "while writing tensors": lambda m: m.setattr(adapter_folder, "write_tensors", _fail),
    "while writing the record": lambda m: m.setattr(adapter_folder.AdapterJson, "write", _fail),
    "while renaming": lambda m: m.setattr(atomic, "_move_into_place", _fail),
}


@pytest.mark.parametrize("broken", BREAKS.values(), ids=BREAKS)
@pytest.mark.parametrize("replacing", [True, False])
def test_a_save_that_fails_leaves_what_was_there(
    broken: Callable[[pytest.MonkeyPatch], None], replacing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = with_adapter()
    target = tmp_path / "a"
    if replacing:
        kit.save("a", target)
    before = {p.name: p.read_bytes() for p in target.iterdir()} if replacing else None
    randomize(kit["a"], seed=9)
    with monkeypatch.context() as patch:
        broken(patch)
        with pytest.raises(FileError, match="cannot be written: the disk is full"):
            kit.save("a", target)
    assert listed(tmp_path) == (["a"] if replacing else [])
    if before is not None:
        assert {p.name: p.read_bytes() for p in target.iterdir()} == before
        attached().load(target)


def test_where_folders_cannot_be_exchanged_a_failed_second_rename_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = with_adapter()
    kit.save("a", tmp_path / "a")
    before = record_of(tmp_path / "a")
    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    real, calls = os.replace, []

    def replace(one: Any, other: Any) -> None:
        calls.append((one, other))
        if len(calls) == 3:  # onto the target; the target aside; the new one in its place
            raise OSError("the disk is full")
        real(one, other)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(FileError, match="cannot be written: the disk is full"):
            kit.save("a", tmp_path / "a")
    assert listed(tmp_path) == ["a"]
    assert record_of(tmp_path / "a") == before
    randomize(kit["a"], seed=9)
    kit.save("a", tmp_path / "a")
    assert listed(tmp_path) == ["a"]
    assert same_bits(attached().load(tmp_path / "a"), kit["a"])


def test_values_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    kit = with_adapter()
    next(kit["a"].parameters()).data[0, 0] = torch.nan
    with pytest.raises(FileError, match="NaN or infinity in model/layers/0"):
        kit.save("a", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_metadata_that_json_cannot_hold(tmp_path: Path) -> None:
    kit = with_adapter()
    for note in ({"x": object()}, {"x": float("nan")}, {"x": {1, 2}}):
        with pytest.raises(FileError, match="metadata cannot be written"):
            kit.save("a", tmp_path / "a", metadata=note)
    assert listed(tmp_path) == []


# --- the base --------------------------------------------------------------------------------------------------------


def test_only_the_base_it_was_made_for(tmp_path: Path) -> None:
    kit = with_adapter()
    kit.save("a", tmp_path / "a")
    base = ZOO["llama"].build()
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight += 1e-4
    other = kitout.attach(base)
    with pytest.raises(WrongBase, match=r"values: 1 of \d+ tensors .*model\.layers\.1\.mlp\.up_proj\.weight"):
        other.load(tmp_path / "a")
    with pytest.raises(WrongBase, match="keys") as caught:
        attached("gpt2").load(tmp_path / "a")
    assert "model.layers.0" in str(caught.value)
    assert other.names == []
    kitout.attach(ZOO["llama"].build().bfloat16()).load(tmp_path / "a")


def test_the_same_base_with_roles_given_otherwise(tmp_path: Path) -> None:
    with_adapter(LoRA(targets="attn.q")).save("a", tmp_path / "a")
    other = kitout.attach(ZOO["llama"].build(), roles={r"1\.self_attn\.q_proj$": "other"})
    with pytest.raises(FileError, match="layers/1/self_attn/q_proj: not found here"):
        other.load(tmp_path / "a")


# --- heads -----------------------------------------------------------------------------------------------------------


class Homemade(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(48, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).tanh()


HEADS = {
    "linear": lambda: nn.Linear(48, 3),
    "no bias": lambda: nn.Linear(48, 3, bias=False),
    "sequential": lambda: nn.Sequential(
        nn.LayerNorm(48, eps=1e-3), nn.Sequential(nn.Linear(48, 9), nn.GELU("tanh")), nn.Dropout(0.1), nn.Linear(9, 3)
    ),
}


@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_heads_of_known_layers(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    kit = with_adapter(LoRA(), "bert", heads={"classifier": make()})
    kit.save("a", tmp_path / "a")
    other = attached("bert")
    loaded = other.load(tmp_path / "a")
    assert repr(loaded.heads) == repr(kit["a"].heads)
    assert same_bits(loaded, kit["a"])
    assert all(p.requires_grad for p in loaded.parameters())
    batch = ZOO["bert"].batch(2, 0)
    with torch.no_grad(), kit.use("a"), other.use("a"):
        assert torch.equal(out(kit(**batch)), out(other(**batch)))


def test_a_head_like_the_base_own(tmp_path: Path) -> None:
    kit = attached("roberta")
    kit.add("a", LoRA(), heads={"classifier": copy.deepcopy(kit.base.classifier).requires_grad_(True)})
    randomize(kit["a"])
    kit.save("a", tmp_path / "a")
    assert record_of(tmp_path / "a")["heads"][0]["module"] == {"same_as_base": True}
    loaded = attached("roberta").load(tmp_path / "a")
    assert same_bits(loaded, kit["a"])
    assert type(loaded.heads["classifier"].module) is type(ZOO["roberta"].build().classifier)
    assert all(p.requires_grad for p in loaded.parameters())


def test_a_head_of_unknown_class_must_be_passed(tmp_path: Path) -> None:
    kit = with_adapter(LoRA(), "bert", heads={"classifier": Homemade()})
    kit.save("a", tmp_path / "a")
    other = attached("bert")
    with pytest.raises(FileError, match=r"Homemade.*heads=\{'classifier': module\}"):
        other.load(tmp_path / "a")
    with pytest.raises(FileError, match=r"inner\.weight"):
        other.load(tmp_path / "a", heads={"classifier": nn.Linear(48, 3)})
    with pytest.raises(FileError, match="none at pooler"):
        other.load(tmp_path / "a", heads={"classifier": Homemade(), "pooler": Homemade()})
    assert other.names == []
    assert same_bits(other.load(tmp_path / "a", heads={"classifier": Homemade()}), kit["a"])


def test_a_base_with_other_labels_is_the_same_base(tmp_path: Path) -> None:
    kit = with_adapter(LoRA(), "bert", heads={"classifier": nn.Linear(48, 3)})
    kit.save("a", tmp_path / "a")
    with_adapter(IA3(), "bert").save("a", tmp_path / "b")
    base = ZOO["bert"].build()
    base.classifier = nn.Linear(48, 11)
    other = kitout.attach(base)
    other.load(tmp_path / "a")
    other.load(tmp_path / "b", name="b")
    other.use("a")
    assert out(other(**ZOO["bert"].batch(2, 0))).shape == (2, 3)


# --- while serving ---------------------------------------------------------------------------------------------------


def test_loading_while_another_thread_runs(tmp_path: Path) -> None:
    kit = with_adapter()
    with_adapter(BitFit()).save("a", tmp_path / "bits")
    with_adapter(LoRA(targets="all-linear")).save("a", tmp_path / "lora")
    with torch.no_grad(), kit.use("a"):
        expected = out(kit(**BATCH))
    stop, wrong = threading.Event(), []

    def serve() -> None:
        with torch.no_grad(), kit.use("a"):
            while not stop.is_set():
                if not torch.equal(out(kit(**BATCH)), expected):
                    wrong.append(1)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for i in range(10):
            kit.load(tmp_path / "bits", name=f"bits{i}")
            kit.load(tmp_path / "lora", name=f"lora{i}")
    finally:
        stop.set()
        thread.join()
    assert not wrong
    assert len(kit.names) == 21


def test_loading_while_another_thread_replaces_the_folder(tmp_path: Path) -> None:
    writer, reader = with_adapter(), attached()
    writer.save("a", tmp_path / "a")
    stop, failed = threading.Event(), []

    def save() -> None:
        while not stop.is_set():
            randomize(writer["a"], seed=1)
            writer.save("a", tmp_path / "a")

    thread = threading.Thread(target=save)
    thread.start()
    try:
        for i in range(60):
            try:
                reader.load(tmp_path / "a", name=f"n{i}")
            except FileError as error:
                failed.append(error)
    finally:
        stop.set()
        thread.join()
    assert not failed


def test_two_threads_cannot_take_one_name(tmp_path: Path) -> None:
    with_adapter().save("a", tmp_path / "a")
    kit, failed = attached(), []

    def load() -> None:
        try:
            kit.load(tmp_path / "a")
        except AdapterExists as error:
            failed.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert kit.names == ["a"]
    assert len(failed) == 3


def test_loading_is_flat_in_the_number_loaded(tmp_path: Path) -> None:
    """Counted, not timed: the Python calls of a load are the same for the first adapter and the fortieth."""
    import cProfile

    with_adapter().save("a", tmp_path / "a")
    kit = attached()

    def calls(name: str) -> int:
        profile = cProfile.Profile()
        profile.runcall(kit.load, tmp_path / "a", name=name)
        return sum(entry.callcount for entry in profile.getstats())

    for i in range(3):
        kit.load(tmp_path / "a", name=f"warm{i}")
    few = calls("few")
    for i in range(40):
        kit.load(tmp_path / "a", name=f"n{i}")
    assert calls("many") <= 1.05 * few


def test_a_folder_from_when_a_path_also_meant_the_sublayer_that_ends_there(tmp_path: Path) -> None:
    kit = with_adapter(BitFit(targets="o_proj sub.attn"))
    kit["a"].method = BitFit(targets="o_proj")  # what was written then
    kit.save("a", tmp_path / "old")
    kit.load(tmp_path / "old", name="b")
    kit.save("b", tmp_path / "new")
    kit.load(tmp_path / "new", name="c")
    results = []
    for name in "abc":
        with torch.no_grad(), kit.use(name):
            results.append(out(kit(**BATCH)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
