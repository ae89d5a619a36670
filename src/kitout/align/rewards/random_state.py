"""The random state of Python, NumPy and torch, set by a seed while foreign code runs and put back after it.

A reward function that draws numbers gives the same ones when a stopped run does a round again, and its draws move none
of the run's own. It knows no reward.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def fixed_random_state(seed: int) -> Iterator[None]:
    """Global generators of `random`, `numpy.random` and torch on the CPU, seeded meanwhile."""
    of_python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.random.set_rng_state(of_torch)
