"""Folders that are damaged, forged or made to hurt: one clear FileError each, and the kit stays as it was."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import kitout
from kitout import LoRA, PrefixTuning, PromptTuning
from kitout.errors import FileError, RouteError
from kitout.files import adapter_json, safetensors_reader
from kitout.runtime.routing.compile import RouteCompiler
from zoo import ZOO

A0 = "model/layers/0/self_attn/q_proj.a"
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kit = kitout.attach(ZOO["llama"].build())
    kit.add("a", LoRA(rank=4), heads={"lm_head": nn.Linear(48, 3)})
    folder = tmp_path_factory.mktemp("pristine") / "a"
    kit.save("a", folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "a"
    copied.mkdir()
    for file in pristine.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    return copied


def refused(folder: Path) -> str:
    kit = kitout.attach(ZOO["llama"].build())
    kit.add("old", LoRA())
    before = {k: v.clone() for k, v in kit.state_dict().items()}
    keys = set(kit.base.state_dict())
    with pytest.raises(FileError) as caught:
        kit.load(folder, name="new")
    assert kit.names == ["old"]
    assert set(kit.base.state_dict()) == keys
    assert all(torch.equal(v, before[k]) for k, v in kit.state_dict().items())
    message = str(caught.value)
    assert len(message) < 5000
    return message


def fields(change: Callable[[dict[str, Any]], Any], sign: bool = True) -> Change:
    """A change of adapter.json. sign: with the digest of what it holds now: a forger can do that too."""

    def apply(folder: Path) -> None:
        record = json.loads((folder / "adapter.json").read_text())
        change(record)
        if sign:
            record["digest"] = adapter_json.digest_of({k: 0.0 if v == 1e999 else v for k, v in record.items()})
        (folder / "adapter.json").write_text(json.dumps(record))

    return apply


def head(module: dict[str, Any]) -> Change:
    """Another description of the head."""
    return fields(lambda r: r["heads"][0].update(module=module))


def text(content: str | bytes) -> Change:
    """Another adapter.json altogether."""
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / "adapter.json").write_bytes(raw)


def resigned(folder: Path) -> None:
    """The record vouches for the tensors' file as it is now: a forger can do that too."""
    raw = (folder / "adapter.safetensors").read_bytes()
    sign = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    fields(lambda r: r.update(tensors=sign))(folder)


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Change:
    """A change of the tensors, signed."""

    def apply(folder: Path) -> None:
        held = load_file(folder / "adapter.safetensors")
        change(held)
        save_file(held, folder / "adapter.safetensors")
        resigned(folder)

    return apply


def header(change: Callable[[dict[str, Any]], Any]) -> Change:
    """A change of the safetensors header alone, signed."""

    def apply(folder: Path) -> None:
        raw = (folder / "adapter.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        head = json.loads(raw[8 : 8 + length])
        new = json.dumps(change(head) or head).encode()
        (folder / "adapter.safetensors").write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])
        resigned(folder)

    return apply


def data(change: Callable[[bytes], bytes], sign: bool = True) -> Change:
    """A change of the tensors' bytes."""

    def apply(folder: Path) -> None:
        path = folder / "adapter.safetensors"
        path.write_bytes(change(path.read_bytes()))
        if sign:
            resigned(folder)

    return apply


def instead(name: str, make: Callable[[Path], Any]) -> Change:
    """Something else under the name of a file."""

    def apply(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return apply


RECORDS: dict[str, tuple[Change, str]] = {
    "empty": (text(""), "not valid json"),
    "no object": (text("[1]"), "must hold a json object"),
    "not utf-8": (text(b"\xff\xfe{}"), "not valid json"),
    "nested": (text("[" * 200_000), "nested too deeply"),
    "nested objects": (text('{"a":' * 200_000), "nested too deeply"),
    "nested in a field": (text('{"format": 1, "note": ' + '{"a":' * 900 + "1" + "}" * 901), "adapter record"),
    "huge number": (text('{"format": ' + "9" * 5000 + "}"), "not valid json"),
    "NaN": (text('{"format": NaN}'), "NaN is not json"),
    "key twice": (text('{"format": 1, "format": 1}'), "twice"),
    "infinite strength": (fields(lambda r: r.update(strength=1e999)), "not valid json"),
    "other format": (fields(lambda r: r.update(format=2)), "format 2"),
    "format of no number": (fields(lambda r: r.update(format="1")), "format"),
    "unknown field": (fields(lambda r: r.update(weights="http://x")), "weights"),
    "field missing": (fields(lambda r: r.pop("sites")), "sites"),
    "wrong type": (fields(lambda r: r.update(seed="three")), "seed"),
    "unknown method": (fields(lambda r: r.update(method="os.system")), "'os.system' is not known"),
    "unknown setting": (fields(lambda r: r["settings"].update(reach=3)), "reach"),
    "bad setting": (fields(lambda r: r["settings"].update(rank=-1)), "rank"),
    "absurd rank": (fields(lambda r: r["settings"].update(rank=10**12)), "rank"),
    "settings of another size": (fields(lambda r: r["settings"].update(rank=8)), "has shape [4, 48]"),
    "targets that match nothing": (fields(lambda r: r["settings"].update(targets="moe.router")), "moe.router"),
    "other targets": (fields(lambda r: r["settings"].update(targets="attn.k attn.v")), "q_proj: not found here"),
    "site moved": (fields(lambda r: r["sites"][0].update(path="../../etc/passwd")), "path was ../../etc/passwd"),
    "site widened": (fields(lambda r: r["sites"][0].update(d_out=49)), "d_out was 49, here 48"),
    "site with channels": (fields(lambda r: r["sites"][0].update(channels=[[0, 9]])), "channels was [[0, 9]]"),
    "site twice": (fields(lambda r: r["sites"].append(r["sites"][0])), "5 sites, 4 different ones"),
    "site missing": (fields(lambda r: r["sites"].pop()), "not in the file"),
    "wrong count": (fields(lambda r: r.update(parameters=1)), "says 1 parameters"),
    "wrong dtype": (fields(lambda r: r.update(dtype="float16")), "says float16"),
    "unknown dtype": (fields(lambda r: r.update(dtype="object")), "dtype"),
    "wrong sum": (fields(lambda r: r["tensors"].update(sha256="0" * 64)), "damaged or exchanged"),
    "wrong size": (fields(lambda r: r["tensors"].update(bytes=5)), "says 5"),
    "head elsewhere": (fields(lambda r: r["heads"][0].update(path="__class__")), "no module '__class__'"),
    "head of the whole model": (fields(lambda r: r["heads"][0].update(path="")), "no module ''"),
    "head of a foreign class": (head({"os.system": {}}), "'os.system' is none"),
    "head with foreign settings": (
        head({"Linear": {"in_features": 48, "device": "cuda"}}),
        "needs exactly in_features, out_features, bias",
    ),
    "head of absurd width": (
        head({"Linear": {"in_features": 48, "out_features": 10**15, "bias": True}}),
        "is not a width",
    ),
    "head of absurd depth": (
        head({"Sequential": [{"ReLU": {}}] * 1000}),
        "more than 64 layers",
    ),
    "head nested": (
        head(json.loads('{"Sequential":[' * 90 + "]}" * 90)),
        "more than 64 layers",
    ),
    "base of no base64": (
        fields(lambda r: next(iter(r["base"]["tensors"].values())).update(values="!!!!")),
        "values: 1 of",
    ),
}  # fmt: skip

TENSORS: dict[str, tuple[Change, str]] = {
    "empty file": (data(lambda b: b""), "cut off or not a safetensors"),
    "cut in the header": (data(lambda b: b[:50]), "cut off"),
    "cut in the data": (data(lambda b: b[:-7]), "cut off or padded"),
    "padded": (data(lambda b: b + b"\0" * 64), "cut off or padded"),
    "a bit flipped": (data(lambda b: b[:-1] + bytes([b[-1] ^ 1]), sign=False), "damaged or exchanged"),
    "header length absurd": (data(lambda b: b"\xff" * 8 + b[8:]), "not a safetensors file"),
    "header no json": (data(lambda b: b[:8] + b"?" + b[9:]), "invalid JSON in header"),
    "a pickle": (data(lambda b: b"PK\x03\x04" + b[4:]), "not a safetensors file"),
    "overlapping": (header(lambda h: h[A0].update(data_offsets=[0, 768])), f"invalid offset for tensor `{A0}`"),
    "negative offsets": (header(lambda h: h[A0].update(data_offsets=[-768, 0])), "integer `-768`"),
    "absurd shape": (header(lambda h: h[A0].update(shape=[2**40, 2**40])), "overflow computing buffer size from shape"),
    "true for one": (header(lambda h: h[A0].update(shape=[True, 192])), "boolean `true`"),
    "many dimensions": (header(lambda h: h[A0].update(shape=[1] * 900 + [192])), "more than 8 dimensions"),
    "unknown dtype": (header(lambda h: h[A0].update(dtype="PICKLE")), "`PICKLE`, expected one of"),
    "entry no object": (header(lambda h: h.update({A0: [1]})), "expected string or map"),
    "another dtype": (tensors(lambda t: t.update({A0: t[A0].half()})), "dtype torch.float16"),
    "integers": (tensors(lambda t: t.update({A0: t[A0].int()})), "dtype torch.int32"),
    "another shape": (tensors(lambda t: t.update({A0: torch.zeros(4, 47)})), "[4, 47], here it must be [4, 48]"),
    "transposed": (tensors(lambda t: t.update({A0: t[A0].T.contiguous()})), "has shape [48, 4]"),
    "missing": (tensors(lambda t: t.pop(A0)), f"tensor '{A0}' is missing"),
    "extra": (tensors(lambda t: t.update({"../../evil": torch.zeros(2)})), "'../../evil' does not belong"),
    "a million names": (
        tensors(lambda t: t.update({f"x{i}": torch.zeros(1) for i in range(5000)})), "and 4996 more does not belong"
    ),
    "NaN": (tensors(lambda t: t[A0].view(-1)[5].fill_(torch.nan)), f"NaN or infinity in {A0}"),
    "infinity": (tensors(lambda t: t[A0].view(-1)[5].fill_(-torch.inf)), f"NaN or infinity in {A0}"),
}  # fmt: skip

FILES: dict[str, tuple[Change, str]] = {
    "no record": (lambda f: (f / "adapter.json").unlink(), "adapter.json is missing"),
    "no tensors": (lambda f: (f / "adapter.safetensors").unlink(), "adapter.safetensors is missing"),
    "record is a folder": (instead("adapter.json", Path.mkdir), "adapter.json"),
    "tensors are a pipe": (instead("adapter.safetensors", os.mkfifo), "not a regular file"),
    "tensors are a device": (instead("adapter.safetensors", lambda p: p.symlink_to("/dev/zero")), "not a regular file"),
    "record is a device": (instead("adapter.json", lambda p: p.symlink_to("/dev/zero")), "not a regular file"),
    "tensors lead to a secret": (
        instead("adapter.safetensors", lambda p: p.symlink_to("/etc/passwd")), "not a safetensors file"
    ),
    "record leads to a secret": (instead("adapter.json", lambda p: p.symlink_to("/etc/passwd")), "not valid json"),
    "a loop": (instead("adapter.json", lambda p: p.symlink_to(p)), "adapter.json"),
}  # fmt: skip

ALL = {f"{kind}: {name}": case for kind, table in
       (("record", RECORDS), ("tensors", TENSORS), ("files", FILES)) for name, case in table.items()}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), ALL.values(), ids=ALL)
def test_refused_with_the_reason(change: Change, said: str, folder: Path) -> None:
    change(folder)
    message = refused(folder)
    assert said in message
    assert "root:" not in message  # nothing of what a link leads to is shown


def test_the_untouched_folder_loads(folder: Path) -> None:
    resigned(folder)
    kitout.attach(ZOO["llama"].build()).load(folder)


def test_several_errors_are_reported_at_once(folder: Path) -> None:
    tensors(lambda t: (t.pop(A0), t.update({A0[:-1] + "b": torch.zeros(48, 5), "strange": torch.zeros(1)})))(folder)
    message = refused(folder)
    assert all(word in message for word in (f"'{A0}' is missing", "'strange'", "has shape [48, 5]"))
    fields(lambda r: r.update(seed="x", dtype="y", more=1))(folder)
    message = refused(folder)
    assert all(word in message for word in ("seed", "dtype", "more"))


def test_an_invalid_name(folder: Path) -> None:
    fields(lambda r: r.update(name="../../evil"))(folder)
    kit = kitout.attach(ZOO["llama"].build())
    with pytest.raises(FileError, match="cannot name an adapter"):
        kit.load(folder)
    kit.load(folder, name="fine")


def test_nothing_large_is_read_before_it_is_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_json, "MAX_ADAPTER_JSON_BYTES", 100)
    assert "at most 100 are read" in refused(folder)
    monkeypatch.undo()
    monkeypatch.setattr(safetensors_reader, "MAX_HEADER_BYTES", 100)
    assert "at most 100 are read" in refused(folder)


def test_no_memory_is_taken_for_what_the_header_only_claims(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file of a terabyte whose header matches its size costs nothing: the shapes do not fit the adapter."""
    head = json.dumps({A0: {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    with (folder / "adapter.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        try:
            file.truncate(8 + len(head) + 2**40)
        except OSError:
            pytest.skip("no sparse files here")
    fields(lambda r: r["tensors"].update(bytes=8 + len(head) + 2**40))(folder)
    assert "has shape [274877906944]" in refused(folder)


# --- the digest of the record ----------------------------------------------------------------------------------------

EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "strength": lambda r: r.update(strength=0.5),
    "alpha": lambda r: r["settings"].update(alpha=3.0),
    "dropout": lambda r: r["settings"].update(dropout=0.5),
    "rslora": lambda r: r["settings"].update(rslora=True),
    "seed": lambda r: r.update(seed=5),
    "name": lambda r: r.update(name="other"),
    "version": lambda r: r.update(kitout="9.9"),
    "metadata": lambda r: r["note"].update(data="yours"),
    "settings of a head": lambda r: r["heads"][0].update(kind="x.Y"),
    "digest": lambda r: r.update(digest="0" * 64),
    "digest emptied": lambda r: r.update(digest=None),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_record_is_refused_unless_it_is_asked_for(edit: Callable[[Any], Any], folder: Path) -> None:
    fields(edit, sign=False)(folder)
    assert "edited or damaged after it was written" in refused(folder)
    kit = kitout.attach(ZOO["llama"].build())
    assert kit.load(folder, verify=False).name in kit


def test_another_layout_of_the_same_record_is_the_same_record(folder: Path) -> None:
    record = json.loads((folder / "adapter.json").read_text())
    backwards = dict(reversed(record.items()))
    (folder / "adapter.json").write_text(json.dumps(backwards, indent=7, ensure_ascii=False))
    kitout.attach(ZOO["llama"].build()).load(folder)


def test_edited_tensors_load_unverified(folder: Path) -> None:
    data(lambda b: b[:-1] + bytes([b[-1] ^ 1]), sign=False)(folder)
    assert "damaged or exchanged" in refused(folder)
    kitout.attach(ZOO["llama"].build()).load(folder, verify=False)
    data(lambda b: b[:-7], sign=False)(folder)  # every other check stays
    with pytest.raises(FileError, match="cut off"):
        kitout.attach(ZOO["llama"].build()).load(folder, verify=False)


# --- what `use` would refuse -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "strength", "said"),
    [
        (PromptTuning(length=3), 0.5, "have no strength"),
        (PrefixTuning(length=3), -0.5, "at least 0"),
    ],
)
def test_a_strength_that_the_method_cannot_have(
    method: kitout.Method, strength: float, said: str, tmp_path: Path
) -> None:
    kit = kitout.attach(ZOO["llama"].build())
    kit.add("a", method)
    kit.save("a", tmp_path / "a")
    fields(lambda r: r.update(strength=strength))(tmp_path / "a")
    assert said in refused(tmp_path / "a")


def test_an_adapter_that_use_refuses_is_not_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the compiler of routes says."""

    def compile_route(self: Any, route: Any, *_: Any) -> Any:
        raise RouteError(f"{route!r} is not for this model")

    monkeypatch.setattr(RouteCompiler, "compile", compile_route)
    assert "'new' is not for this model" in refused(folder)


@pytest.mark.parametrize("given", [lambda kit: kit.base.lm_head, lambda kit: "no module"])
def test_a_head_that_add_would_refuse(given: Callable[[kitout.Kit], Any], folder: Path) -> None:
    kit = kitout.attach(ZOO["llama"].build())
    with pytest.raises(FileError, match="heads: 'lm_head' "):
        kit.load(folder, heads={"lm_head": given(kit)})
    assert kit.names == []
