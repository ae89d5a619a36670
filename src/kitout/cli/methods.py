"""`kitout methods [NAME]`: what can be trained, and with which learning rate, decay and settings.

Everything is read off the registered classes: the table and the page of one method never know more than the code. The
words for a setting are those of the class's docstring ("rank: ..."). A table on a terminal, plain columns elsewhere,
`--json` for machines. Words and printing only.
"""

from __future__ import annotations

import inspect
import json
import re
from difflib import get_close_matches
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kitout import methods as _registering  # noqa: F401 - all there are
from kitout.method import REGISTRY, Method
from kitout.runtime.show import align_columns
from kitout.train.config.describe import type_text
from kitout.train.loop.optimizer import refuse_above, warn_above

METHOD_COLUMNS = ("method", "what it adds", "where, by default", "lr", "decay", "merges", "rows and mixes")
SETTING_COLUMNS = ("setting", "default", "takes", "what")


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="one method, with all its settings")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """List the methods: what each adds, where, its learning rate and decay, whether it merges."""
    known = {key.lower(): key for key in REGISTRY}
    if name is not None and name.lower() not in known:
        typer.echo(f"error: there is no method {name!r}: {_suggest_method(name, known)}", err=True)
        raise typer.Exit(1)
    chosen = list(REGISTRY) if name is None else [known[name.lower()]]
    pages = [method_info(REGISTRY[key]) for key in chosen]
    if as_json:
        typer.echo(json.dumps(pages if name is None else pages[0], indent=2))
    elif name is None:
        _print_table(METHOD_COLUMNS, [_table_row(page) for page in pages])
        typer.echo(
            "lr: of AdamW over a short rise and a fall to zero, found by search; decay: of matrices alone. "
            "`kitout methods NAME` shows the settings."
        )
    else:
        typer.echo("\n".join(_page_header(pages[0], REGISTRY[chosen[0]])))
        _print_table(
            SETTING_COLUMNS, [(s["name"], _to_text(s["default"]), s["takes"], s["what"]) for s in pages[0]["settings"]]
        )


def _suggest_method(name: str, known: dict[str, str]) -> str:
    """What was meant, whatever its case: `loar`, `prefix`."""
    low = name.lower()
    close = [known[k] for k in known if low in k] or [known[k] for k in get_close_matches(low, known, n=3)]
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(REGISTRY)}"


def method_info(method: type[Method]) -> dict[str, Any]:
    """All there is to say about a method, as plain values."""
    summary, words = parse_docstring(method)
    return {
        "name": method.__name__,
        "summary": summary,
        "seat": method.default_location or method.default_targets,
        "lr": method.training.lr,
        "decay": method.training.weight_decay,
        "head_lr": method.training.head_lr,
        "warned_from": warn_above(method),
        "refused_from": refuse_above(method),
        "mergeable": method.mergeable,
        "identity": method.starts_as_identity,
        "note": method.limitations,
        "settings": [
            {
                "name": name,
                "default": field.get_default(call_default_factory=True),
                "takes": type_text(field.annotation, field.metadata),
                "what": words.get(name, ""),
            }
            for name, field in method.model_fields.items()
        ],
    }


def parse_docstring(method: type[Method]) -> tuple[str, dict[str, str]]:
    """The first paragraph of the docstring, and what it says of each setting ("rank, alpha: a number ...").

    What a method does not say of a setting, the class it inherits it from may.
    """
    name = "|".join(method.model_fields)
    begins = re.compile(rf"(?:^|(?<=\s))((?:{name})(?:, (?:{name}))*): ")
    words: dict[str, str] = {}
    for cls in reversed([c for c in method.__mro__ if issubclass(c, Method)]):
        for paragraph in (cls.__doc__ or "").split("\n\n"):
            _, *parts = begins.split(" ".join(paragraph.split()))
            for names, text in zip(parts[::2], parts[1::2], strict=True):
                words |= dict.fromkeys(names.split(", "), text.strip())
    summary = " ".join((method.__doc__ or "").split("\n\n")[0].split())
    return begins.split(summary)[0].strip(), words


def _table_row(page: dict[str, Any]) -> tuple[str, ...]:
    rows = page["note"] or "any"
    merges = "yes" if page["mergeable"] else "no"
    gist = re.split(r"[.;] |\.$", page["summary"])[0]
    return (page["name"], gist, page["seat"], f"{page['lr']:g}", f"{page['decay']:g}", merges, rows)


def _page_header(page: dict[str, Any], method: type[Method]) -> list[str]:
    own = method.training_defaults.__doc__ if method.training_defaults is not Method.training_defaults else None
    merges = "merges into the base" if page["mergeable"] else "does not merge into the base"
    start = "changes nothing" if page["identity"] else "already changes the outputs"
    warned, refused_from = page["warned_from"], page["refused_from"]
    return [
        f"{page['name']}: {page['summary']}",
        f"sits at: {page['seat']}",
        f"{merges}; a fresh one {start}",
        *([f"rows and mixes: {page['note']}"] if page["note"] else []),
        f"learning rate {page['lr']:g} with AdamW; from {warned:g} on a warning, from {refused_from:g} on refused",
        *([inspect.cleandoc(own)] if own else []),
        f"weight decay {page['decay']:g} on matrices; learning rate of a fresh head {page['head_lr']:g}",
        f"in Python: kitout.{page['name']}(setting=value, ...)",
        "",
    ]


def _to_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    console = Console()
    if not console.is_terminal:
        typer.echo("\n".join(line.removeprefix("  ") for line in align_columns([header, *rows])))
        return
    table = Table()
    for title in header:
        table.add_column(title, overflow="fold", no_wrap=title in ("method", "lr", "setting"))
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    console.print(table)
