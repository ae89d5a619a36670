"""`module:function`: the user's own code as a reward, function(prompts, completions, rows) -> list of numbers or None.

The module is imported as Python does it, from the working directory first, then from installed packages; its name comes
from the config or the command line, never from data, and is never made into a path. What fails inside the function is
raised again with the function's name and the line of its own code. It knows no model.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from kitout.align.rewards.reward import AnswerBatch
from kitout.errors import RewardError, suggest

SIGNATURE = "(prompts, completions, rows)"


@dataclass(frozen=True)
class FunctionReward:
    """A function as a source of rewards."""

    name: str
    """`module:function`."""
    function: Callable[[list[Any], list[str], list[dict[str, Any]]], Any]
    """Given, per answer, the prompt (text, or messages as the data have them), the answer as text and the columns of
    its row; returns one number per answer, or None to leave it out."""
    folder: str = ""
    """Where its modules are found, those that it imports when it is called too; "": where Python looks anyway."""

    def score(self, answers: AnswerBatch) -> Sequence[float | None]:
        """What the function returned, unchecked; RewardError, chained, for what it raised."""
        prompts = [deepcopy(prompt) for prompt in answers.prompts]  # the function may change what it gets
        rows = [deepcopy(dict(row)) for row in answers.rows]
        try:
            with _found_in(self.folder):
                return self.function(prompts, list(answers.completions), rows)
        except (Exception, SystemExit) as error:
            raise RewardError(f"reward {self.name} raised {_last_line(error)}") from error


def import_function(text: str) -> FunctionReward:
    """text: `module:function`. RewardError for a module that cannot be imported, a function that is not in it or that
    does not take three arguments.
    """
    module_name, _, name = text.partition(":")
    module = _import_module(module_name, text)
    function = vars(module).get(name)
    if function is None:
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RewardError(
            f"reward {text}: {getattr(module, '__file__', None) or module_name} has no function {name!r}; "
            f"{suggest(name, functions)}"
        )
    if not callable(function):
        raise RewardError(f"reward {text}: {name} is {type(function).__name__}, expected a function{SIGNATURE}")
    if inspect.iscoroutinefunction(function):
        raise RewardError(f"reward {text}: {name} is async: write a plain function{SIGNATURE}, with asyncio.run inside")
    try:
        inspect.signature(function).bind([], [], [])
    except TypeError as error:
        found = f"{name}{inspect.signature(function)}"
        raise RewardError(f"reward {text}: it is called as {name}{SIGNATURE}, found {found}: {error}") from error
    except ValueError:  # builtins have no signature
        pass
    return FunctionReward(text, function, str(Path.cwd()))


def _import_module(name: str, text: str) -> ModuleType:
    folder = str(Path.cwd())
    try:
        with _found_in(folder):
            return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise RewardError(
                f"reward {text}: there is no module {error.name!r} in {folder} or installed: start in the folder "
                f"of {error.name}.py, or write another module:function"
            ) from error
        raise RewardError(f"reward {text}: importing {name} raised {_last_line(error)}") from error


@contextmanager
def _found_in(folder: str) -> Iterator[None]:
    """Python looks for modules in this folder first meanwhile; "" changes nothing."""
    added = [folder] if folder else []
    sys.path[:0] = added
    try:
        yield
    finally:
        for one in added:
            with suppress(ValueError):  # the user's code took it out itself
                sys.path.remove(one)


def _last_line(error: BaseException) -> str:
    """The error and where it arose, as in "KeyError: 'x' (rewards.py, line 3: row['x'])".

    The last line of code below the working directory, where a user's own code is; else the last line of all.
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    folder = Path.cwd()
    own = [f for f in frames if folder in Path(f.filename).parents and "site-packages" not in f.filename]
    place = "".join(f" ({Path(f.filename).name}, line {f.lineno}: {f.line})" for f in (own or frames)[-1:])
    if isinstance(error, SyntaxError) and error.filename:
        place = f" ({Path(error.filename).name}, line {error.lineno}: {(error.text or '').strip()})"
    return traceback.format_exception_only(error)[-1].strip() + place
