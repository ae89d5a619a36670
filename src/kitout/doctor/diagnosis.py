"""What was found on a machine, as values and as text: versions, device, cache, optional parts, and what is wrong.

A finding is one line with its fix. Only what kitout needs to work at all makes a diagnosis bad. It looks at nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from kitout.format import format_bytes


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    what: str
    """What was found."""
    fix: str
    """What to do."""
    is_needed: bool = False
    """Whether kitout does not work without it."""

    def __str__(self) -> str:
        return f"{self.what}: {self.fix}"


@dataclass(frozen=True)
class OptionalPart:
    """An extra of kitout, or a package it works with."""

    name: str
    """Its name."""
    purpose: str
    """What it is for."""
    missing: tuple[str, ...]
    """The packages of it that are not installed, or too old."""
    install: str
    """The line that installs it here."""


@dataclass
class Diagnosis:
    """What was found on this machine; `print` shows it, `to_dict` has it as plain values."""

    versions: dict[str, str] = field(default_factory=dict)
    """kitout, Python and the packages kitout needs; "" where one is not installed."""
    system: dict[str, Any] = field(default_factory=dict)
    """The platform, where kitout lies, threads and processors, bytes of memory available."""
    device: dict[str, Any] = field(default_factory=dict)
    """The device that `auto` takes; of a GPU also its memory."""
    dtypes: dict[str, Any] = field(default_factory=dict)
    """GFLOP/s of a matrix product by dtype, the one that `auto` takes, and why."""
    cache: dict[str, Any] = field(default_factory=dict)
    """The cache folder, bytes by asset, all of its bytes, and bytes available on its disk."""
    parts: list[OptionalPart] = field(default_factory=list)
    """Optional parts, installed or not."""
    findings: list[Finding] = field(default_factory=list)
    """What is wrong, what is needed first."""

    @property
    def ok(self) -> bool:
        """Whether everything that kitout needs works."""
        return not any(finding.is_needed for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(result: Diagnosis) -> Iterator[str]:
    rows: list[tuple[str, Callable[[], Iterator[str]]]] = [
        (
            "versions",
            lambda: _in_lines([f"{name} {version or 'missing'}" for name, version in result.versions.items()]),
        ),
        ("system", lambda: _system_lines(result.system)),
        ("device", lambda: _device_lines(result.device)),
        ("dtypes", lambda: _dtype_lines(result.dtypes)),
        ("cache", lambda: _cache_lines(result.cache)),
        ("optional", lambda: _part_lines(result.parts)),
    ]
    for title, lines in rows:
        for number, line in enumerate(lines()):
            yield f"{title if number == 0 else '':<10}{line}"
    yield ""
    yield from (f"problem: {finding}" for finding in result.findings)
    if not result.findings:
        yield "no problems found"


def _in_lines(words: list[str], width: int = 66) -> Iterator[str]:
    line = ""
    for word in words:
        if line and len(line) + 2 + len(word) > width:
            yield f"{line},"
            line = ""
        line += f", {word}" if line else word
    yield line


def _system_lines(system: Mapping[str, Any]) -> Iterator[str]:
    if system:
        yield system["platform"]
        yield f"kitout in {system['location']}"
        yield f"{system['executable']}"
    if "threads" in system:
        memory = system["memory_available"]
        text = "" if memory is None else f"; {format_bytes(memory)} of memory available"
        yield f"{system['threads']} threads on {system['processors']} processors{text}"


def _device_lines(device: Mapping[str, Any]) -> Iterator[str]:
    if not device:
        yield "not known"
        return
    yield f"{device['type']}: {device['name']}"
    if "memory_total" in device:
        free, total = format_bytes(device["memory_available"]), format_bytes(device["memory_total"])
        yield f"{device['count']} of them; {free} of {total} available on the first"


def _dtype_lines(dtypes: Mapping[str, Any]) -> Iterator[str]:
    if dtypes:
        speeds = ", ".join(f"{name} {value:,.0f} GFLOP/s" for name, value in dtypes["gflops_per_second"].items())
        yield f"{speeds}; auto takes {dtypes['auto']}"
        yield dtypes["reason"]


def _cache_lines(cache: Mapping[str, Any]) -> Iterator[str]:
    if not cache:
        return
    yield f"{cache['folder']} (KITOUT_CACHE changes it)"
    yield f"{format_bytes(cache['bytes'])}; {format_bytes(cache['disk_available'])} free on its disk"
    yield from (f"  {name:<16} {format_bytes(size):>9}" for name, size in cache["assets"].items())
    if not cache["assets"]:
        yield "  no built-in model or data set yet: kitout assets list"


def _part_lines(parts: list[OptionalPart]) -> Iterator[str]:
    for part in parts:
        yield f"{part.name:<13} {'missing' if part.missing else 'installed':<10} {part.purpose}"
        if part.missing:
            absent = f"  (for {', '.join(part.missing)})" if part.missing != (part.name,) else ""
            yield f"  {part.install}{absent}"
