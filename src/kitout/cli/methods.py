"""`kitout methods [NAME]`: the adapter methods, with their learning rates, weight decay and settings.

Everything is taken from the registered classes, so the table and the page of one method never know more than the code.
A setting is described by the class's docstring ("rank: ..."). A table on a terminal, plain columns elsewhere, `--json`
for programs.
"""

from __future__ import annotations

import inspect
import json
import re
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kitout import methods as _register_all  # noqa: F401
from kitout.cli.terminal import report_errors
from kitout.format import align_columns
from kitout.method import REGISTRY, Method
from kitout.train.config.method_field import find_method
from kitout.train.config.type_text import type_text
from kitout.train.loop.optimizer import refuse_above, warn_above

METHOD_COLUMNS = ("method", "what it trains", "default location", "lr", "weight decay", "merges", "limitations")
SETTING_COLUMNS = ("setting", "default", "type", "description")


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="one method, with its settings")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List the methods: what each trains, where, its learning rate and weight decay, whether it merges.

    Example: kitout methods LoRA
    """
    with report_errors():
        method, implied = (None, {}) if name is None else find_method(name)
    names = list(REGISTRY) if method is None else [method.__name__]
    pages = [method_info(REGISTRY[key]) for key in names]
    if as_json:
        typer.echo(json.dumps(pages if name is None else pages[0], indent=2))
    elif name is None:
        _print_table(METHOD_COLUMNS, [_table_row(page) for page in pages])
        typer.echo(
            "lr: peak learning rate of AdamW, linear warmup and decay to zero, found by search; weight decay: of "
            "matrices only. `kitout methods NAME` shows the settings."
        )
    else:
        if implied:
            typer.echo(f"{name} is {names[0]} with {', '.join(f'{key}={_to_text(v)}' for key, v in implied.items())}")
        typer.echo("\n".join(_page_header(pages[0], REGISTRY[names[0]])))
        _print_table(
            SETTING_COLUMNS,
            [(s["name"], _to_text(s["default"]), s["type"], s["description"]) for s in pages[0]["settings"]],
        )


def method_info(method: type[Method]) -> dict[str, Any]:
    """Everything the code says about a method, as plain values."""
    summary, setting_texts = parse_docstring(method)
    return {
        "name": method.__name__,
        "summary": summary,
        "default_location": method.default_location or method.default_targets,
        "lr": method.training.lr,
        "weight_decay": method.training.weight_decay,
        "head_lr": method.training.head_lr,
        "warn_from": warn_above(method),
        "refuse_from": refuse_above(method),
        "mergeable": method.mergeable,
        "starts_as_identity": method.starts_as_identity,
        "limitations": method.limitations,
        "settings": [
            {
                "name": name,
                "default": field.get_default(call_default_factory=True),
                "type": type_text(field.annotation, field.metadata),
                "description": setting_texts.get(name, ""),
            }
            for name, field in method.model_fields.items()
        ],
    }


def parse_docstring(method: type[Method]) -> tuple[str, dict[str, str]]:
    """The first paragraph of the docstring, and its text for each setting ("rank, alpha: a number ...").

    A setting that a method's docstring does not describe may be described by the class it inherits from.
    """
    setting = "|".join(method.model_fields)
    heading = re.compile(rf"(?:^|(?<=\s))((?:{setting})(?:, (?:{setting}))*): ")
    setting_texts: dict[str, str] = {}
    for cls in reversed([c for c in method.__mro__ if issubclass(c, Method)]):
        for paragraph in (cls.__doc__ or "").split("\n\n"):
            _, *pieces = heading.split(" ".join(paragraph.split()))
            for names, text in zip(pieces[::2], pieces[1::2], strict=True):
                setting_texts |= dict.fromkeys(names.split(", "), text.strip())
    summary = " ".join((method.__doc__ or "").split("\n\n")[0].split())
    return heading.split(summary)[0].strip(), setting_texts


def _table_row(page: dict[str, Any]) -> tuple[str, ...]:
    clause = re.split(r"[.;] |\.$", page["summary"])[0]
    merges = "yes" if page["mergeable"] else "no"
    limitations = page["limitations"] or "none"
    return (
        page["name"],
        clause,
        page["default_location"],
        f"{page['lr']:g}",
        f"{page['weight_decay']:g}",
        merges,
        limitations,
    )


def _page_header(page: dict[str, Any], method: type[Method]) -> list[str]:
    overridden = method.training_defaults is not Method.training_defaults
    defaults_doc = method.training_defaults.__doc__ if overridden else None
    merges = "merges into the base" if page["mergeable"] else "does not merge into the base"
    warn, refuse = page["warn_from"], page["refuse_from"]
    start = "leaves the outputs bit-identical" if page["starts_as_identity"] else "already changes the outputs"
    return [
        f"{page['name']}: {page['summary']}",
        f"default location: {page['default_location']}",
        f"{merges}; a new adapter {start}",
        *([f"limitations: {page['limitations']}"] if page["limitations"] else []),
        f"learning rate {page['lr']:g} with AdamW; a warning from {warn:g}, refused from {refuse:g}",
        *([inspect.cleandoc(defaults_doc)] if defaults_doc else []),
        f"weight decay {page['weight_decay']:g} on matrices; lr of a newly initialized head {page['head_lr']:g}",
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
