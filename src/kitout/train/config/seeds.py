"""Jobs that are trained with several seeds: what their adapters are called, and which of them belong together.

Each seed of a job is an adapter of its own, NAME-s0 for seed 0, so that all that trains, saves and evaluates sees plain
adapters. Here is what else has to be known of them. It knows names and numbers, and no config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, Field

SeedsByJob: TypeAlias = Mapping[str, Mapping[str, int]]  # job -> adapter -> its seed, of jobs with several seeds


def _check_distinct(value: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(value)) < len(value):
        raise ValueError(f"expected each seed once; found {', '.join(map(str, value))}")
    return value


Seeds: TypeAlias = Annotated[tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(_check_distinct)]


def adapter_name(job: str, seed: int) -> str:
    """lora, 0 -> lora-s0"""
    return f"{job}-s{seed}"


def repeated_adapters(seeds: SeedsByJob) -> frozenset[str]:
    """Adapters that repeat another one with a further seed: what is said of that one before training holds for them."""
    return frozenset(adapter for adapters in seeds.values() for adapter in list(adapters)[1:])


def job_of(seeds: SeedsByJob, adapter: str) -> str:
    """The job that an adapter is one seed of; its own name where it is the job's only one."""
    return next((job for job, adapters in seeds.items() if adapter in adapters), adapter)
