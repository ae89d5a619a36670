"""A soak: one model, many threads and tasks, every kind of call, pauses in between; each answer has to be its own.

Some threads call directly, others run tasks whose calls go to worker threads. Each call draws a route, pauses between
`with` and forward, and answers, generates, differentiates or fails first. One more thread adds and removes adapters
that are read off a text, and copies the kit. As a script it takes the number of calls (src and tests on PYTHONPATH):
`python tests/soak.py 10000`.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kitout import IA3, Kit, LoRA, PrefixTuning, PromptTuning, Stack
from kitout.errors import RouteError
from laws.activate import kit_with, loss_of, run
from zoo import ZOO

METHODS = {
    "lora": LoRA(rank=2, targets="all-linear"),
    "other": LoRA(rank=3),
    "scale": IA3(),
    "prompt": PromptTuning(length=3),
    "prefix": PrefixTuning(length=4),
}
ROUTES: tuple[Any, ...] = (
    None, *METHODS, Stack("prompt", "lora"), ["lora", None, "prompt"], ["prefix", "other", "lora"], ["prompt"] * 3,
)  # fmt: skip
BATCH = ZOO["llama"].batch(3, 0)
THREADS, TASKS = 6, 3


def generate(kit: Kit) -> Tensor:
    tokens: Tensor = kit.generate(**BATCH, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return tokens


def search(kit: Kit) -> Tensor:
    tokens: Tensor = kit.generate(**BATCH, num_beams=2, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    return tokens


def differentiate(kit: Kit) -> Tensor:
    """Some gradients of this call alone."""
    loss = loss_of(kit(**BATCH))
    if not loss.requires_grad:
        return loss
    parameters = [p for name in METHODS for p in kit[name].parameters()]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([g.flatten()[:5] for g in found if g is not None])


def fail_first(kit: Kit) -> Tensor:
    """Two calls that raise, inside the forward and before it, and one that answers."""
    with contextlib.suppress(IndexError):
        kit(input_ids=torch.full((3, 2), 10_000))
    if isinstance(kit.active, tuple):
        with contextlib.suppress(RouteError):
            kit(input_ids=BATCH["input_ids"][:2])
    return run(kit, BATCH)


CALLS: dict[str, Callable[[Kit], Tensor]] = {
    "forward": lambda kit: run(kit, BATCH),
    "generate": generate,
    "search": search,
    "differentiate": differentiate,
    "fail first": fail_first,
}
SHARES = (12, 2, 1, 3, 2)


@dataclass
class Soak:
    """One soak in progress."""

    num_calls: int
    """How many calls there are."""
    pause: float = 0.01
    """The longest pause between `with` and the call, in seconds."""
    num_begun: int = 0
    """Calls that were begun."""
    right: Counter[str] = field(default_factory=Counter)
    """Kind of call -> how many were right."""
    wrong: list[str] = field(default_factory=list)
    """What was wrong, or raised."""

    def __post_init__(self) -> None:
        self.kit, _ = kit_with("llama", **METHODS)
        self.lock = threading.Lock()
        self.want: dict[tuple[str, int], Tensor] = {}
        for kind, call in CALLS.items():
            for i, route in enumerate(ROUTES):
                with self.kit.use(route):
                    self.want[kind, i] = call(self.kit)

    def begin(self) -> bool:
        with self.lock:
            self.num_begun += 1
            return self.num_begun <= self.num_calls

    def note(self, kind: str, wrong: str = "") -> None:
        with self.lock:
            if wrong:
                self.wrong.append(f"{kind}: {wrong}")
            else:
                self.right[kind] += 1

    def call(self, kind: str, route: int, pause: float = 0.0) -> None:
        """One call under whatever is active."""
        time.sleep(pause)
        try:
            answer = CALLS[kind](self.kit)
        except Exception as error:
            self.note(kind, f"{ROUTES[route]} raised {error!r}")
        else:
            self.note(kind, "" if torch.equal(answer, self.want[kind, route]) else f"{ROUTES[route]} got another's")

    def draw(self, random_: random.Random) -> tuple[str, int, float]:
        kind = random_.choices(list(CALLS), SHARES)[0]
        return kind, random_.randrange(len(ROUTES)), random_.random() * self.pause

    def in_thread(self, seed: int) -> None:
        random_ = random.Random(seed)
        while self.begin():
            kind, route, pause = self.draw(random_)
            if route == 0:  # the base outside of every `with`
                self.call(kind, route, pause)
                continue
            with self.kit.use(ROUTES[route]):
                self.call(kind, route, pause)

    async def in_task(self, seed: int) -> None:
        random_ = random.Random(seed)
        while self.begin():
            kind, route, pause = self.draw(random_)
            with self.kit.use(ROUTES[route]):
                await asyncio.sleep(pause)
                await asyncio.to_thread(self.call, kind, route)

    async def all_tasks(self) -> None:
        await asyncio.gather(*(self.in_task(1000 + i) for i in range(TASKS)))

    def change_adapters(self) -> None:
        """Adapters that nobody uses come and go; the first answer of each seed is that of all."""
        first: dict[str, Tensor] = {}
        while self.num_begun < self.num_calls:
            for name, method in {"read": PrefixTuning(length=3, init=(5, 6, 7)), "drawn": LoRA(rank=2)}.items():
                adapter = self.kit.add(name, method, seed=1)
                values = torch.cat([p.detach().flatten() for p in adapter.parameters()])
                if not torch.equal(first.setdefault(name, values), values):
                    self.note("add", f"{name} has other values than the first of its seed")
                self.kit.remove(name)
            copied = copy.deepcopy(self.kit)
            with copied.use("prompt"):
                if not torch.equal(run(copied, BATCH), self.want["forward", ROUTES.index("prompt")]):
                    self.note("deepcopy", "the copy answers otherwise")
            time.sleep(self.pause)

    def run(self) -> Soak:
        def guarded(work: Callable[[], None]) -> None:
            try:
                work()
            except BaseException as error:
                self.note("thread", repr(error))

        works: list[Callable[[], None]] = [
            *(lambda seed=seed: self.in_thread(seed) for seed in range(THREADS)),  # type: ignore[misc]
            lambda: asyncio.run(self.all_tasks()),
            self.change_adapters,
        ]
        threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(900)
            if thread.is_alive():
                self.note("thread", "hangs")
        return self


if __name__ == "__main__":
    torch.set_num_threads(1)
    start = time.monotonic()
    soak = Soak(int(sys.argv[1])).run()
    right = f"{sum(soak.right.values())} right {dict(soak.right)}"
    lines = (f"{right}, {len(soak.wrong)} wrong, {time.monotonic() - start:.0f} s", *soak.wrong[:20])
    sys.stdout.write("\n".join((*lines, "")))
