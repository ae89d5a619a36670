"""adapter.json: what an adapter is, beside its tensors. Its fields, how they are written and how they are read.

Everything that a load needs is here, and every field is checked: unknown fields, other types and impossible values are
all named in one FileError. A digest over all fields shows whether one was edited. It knows the schema only;
`adapter_folder.py` checks whether it fits a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kitout import methods as _registering  # noqa: F401 - a file may name any method there is
from kitout.base.site import Site
from kitout.errors import Errors, FileError, suggest
from kitout.files.base_fingerprint import Fingerprint
from kitout.files.safetensors_reader import open_regular, parse_json
from kitout.files.usage_record import UsageRecord
from kitout.method import REGISTRY, Method

FORMAT: Literal[1] = 1
MAX_ADAPTER_JSON_BYTES = 64 * 2**20
MAX_SHOWN_ERRORS = 12
RECORD, TENSORS = "adapter.json", "adapter.safetensors"


class _StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SiteEntry(_StrictModel):
    """One site."""

    key: str
    """Its name in tensor names."""
    path: str
    """Of its module."""
    role: str
    port: str
    d_in: int
    d_out: int
    channels: list[list[int]] | None = None
    """Its channels of a fused projection, as runs [first, last + 1]; None: all."""

    @classmethod
    def of(cls, site: Site) -> SiteEntry:
        return cls(
            key=site.key,
            path=site.path,
            role=site.role,
            port=site.port,
            d_in=site.d_in,
            d_out=site.d_out,
            channels=runs(site.channels),
        )


class HeadEntry(_StrictModel):
    """One head: a module of the base that the adapter replaces."""

    path: str
    """Of the module in the base."""
    kind: str
    """Full name of its class."""
    module: dict[str, Any] | None
    """How to build it again (`head_spec.py`); None where its class is not among the known layers."""


class TensorsEntry(_StrictModel):
    """The file of the tensors."""

    bytes: int = Field(ge=0)
    """Its size."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of all its bytes."""


class AdapterJson(_StrictModel):
    """One adapter. The fields and their order are those of the file."""

    format: Literal[1]
    """Version of this schema."""
    kitout: str
    """Version of kitout that wrote it."""
    name: str
    method: str
    """Class name of the method."""
    settings: dict[str, Any]
    """Every setting of the method."""
    seed: int | None
    """Of its initial values."""
    strength: float = Field(allow_inf_nan=False)
    dtype: Literal["float64", "float32", "float16", "bfloat16", "mixed"]
    """Of its floating-point tensors; "mixed" where they differ."""
    parameters: int = Field(ge=0)
    """Number of trainable parameters."""
    sites: list[SiteEntry]
    heads: list[HeadEntry]
    tensors: TensorsEntry
    base: Fingerprint
    """Of the base it was made for."""
    note: dict[str, Any]
    """The adapter's metadata: whatever the user wrote."""
    base_name: str | None = None
    """The base by its name on the hub or among the built-in models; None where it was a folder, or where `usage` says
    it."""
    usage: UsageRecord | None = None
    """How it is used: task, labels, preprocessing, base; None where the adapter was made without a task."""
    parts: dict[str, str] | None = None
    """A composition's parts, with digests of what they compute (`part_folders.py`); None for any other adapter."""
    digest: str | None = None
    """`digest_of` all other fields; None in files that were written before there were digests."""

    def write(self, path: Path) -> None:
        """Writes readable json with its digest; raises FileError if the metadata holds what json cannot."""
        fields = self.model_dump(exclude={"digest"})
        for site in fields["sites"]:
            if site["channels"] is None:
                del site["channels"]
        for name in ("base_name", "usage", "parts"):
            if fields[name] is None:
                del fields[name]
        try:
            fields = json.loads(json.dumps(fields, allow_nan=False))  # as a reader gets them: keys are texts
            fields["digest"] = digest_of(fields)
            # Long lists stay on one line each: the file is for people too.
            lines = [f"{json.dumps(k)}: {_to_json_lines(v)}" for k, v in fields.items()]
        except (TypeError, ValueError, RecursionError) as error:
            raise FileError(
                f"metadata cannot be written as json: {error}; use strings, numbers, lists and dicts"
            ) from None
        path.write_text("{\n  " + ",\n  ".join(lines) + "\n}\n", encoding="utf-8")

    def method_instance(self) -> Method:
        """The method with its settings; raises FileError that names what is unknown."""
        cls = REGISTRY.get(self.method)
        if cls is None:
            raise FileError(
                f"method {self.method[:80]!r} is not known here: {suggest(self.method[:80], REGISTRY)} A method of "
                "your own must be imported before its adapters are loaded"
            )
        try:
            return cls(**self.settings)
        except (ValueError, TypeError, RecursionError) as error:
            raise FileError(f"settings: {str(error)[:500]}") from None


def _to_json_lines(value: Any) -> str:
    """One item of a list or object per line where its items are objects."""
    dump = json.dumps
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n    " + ",\n    ".join(dump(v, allow_nan=False) for v in value) + "\n  ]"
    if isinstance(value, dict) and "tensors" in value:
        inner = [f"{dump(k)}: {dump(v, allow_nan=False)}" for k, v in value["tensors"].items()]
        rest = [f"{dump(k)}: {dump(v, allow_nan=False)}" for k, v in value.items() if k != "tensors"]
        return (
            "{\n    " + ",\n    ".join([*rest, '"tensors": {\n      ' + ",\n      ".join(inner) + "\n    }"]) + "\n  }"
        )
    return dump(value, allow_nan=False)


def digest_of(fields: Mapping[str, Any]) -> str:
    """sha256 of the fields of a record but `digest` itself, whatever their order and the spaces between them."""
    values = {key: value for key, value in fields.items() if key != "digest"}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_adapter_json(path: Path, verify: bool = True) -> AdapterJson:
    """The record in a file, checked field by field. verify: FileError where it was edited after it was written."""
    file, _ = open_regular(path, MAX_ADAPTER_JSON_BYTES)
    with file:
        fields = parse_json(file.read(MAX_ADAPTER_JSON_BYTES + 1), path)
    version = fields.get("format")
    if type(version) is int and version > FORMAT:
        raise FileError(
            f"{path} has format {version}, written by kitout {str(fields.get('kitout'))[:40]}; this kitout reads up to "
            f"{FORMAT}: install a newer one"
        )
    try:
        record = AdapterJson.model_validate(fields)
    except ValidationError as error:
        errors = Errors(FileError, f"{path} is not an adapter record")
        for e in error.errors(include_url=False, include_input=False):
            errors.add(f"{'.'.join(map(str, e['loc']))[:120]}: {e['msg'][:200]}")
        errors.shorten(MAX_SHOWN_ERRORS, "fields")
        errors.raise_if_any()
        raise
    if verify and "digest" in fields and record.digest != digest_of(fields):
        raise FileError(
            f"{path} was edited or damaged after it was written: its fields are not those of its digest. Copy the "
            "folder again, or load it as it is: kit.load(folder, verify=False)"
        )
    return record


def runs(channels: tuple[int, ...] | None) -> list[list[int]] | None:
    """Sorted indices as [first, last + 1] runs: interleaved layouts have few runs and many channels."""
    if channels is None:
        return None
    result: list[list[int]] = []
    for channel in channels:
        if result and result[-1][1] == channel:
            result[-1][1] = channel + 1
        else:
            result.append([channel, channel + 1])
    return result
