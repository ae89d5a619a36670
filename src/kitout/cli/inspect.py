"""`kitout inspect MODEL`: the sites of a model, where adapters can be placed, before any of its weights is loaded.

It builds the model on the meta device from a folder with a config, a model type or a timm name, finds its sites and
prints them by role, layer and width; then the towers, and the projections without a role. No forward runs, so the parts
of a fused projection are not listed one by one (`kitout.attach` does that). `--check` builds it with values and runs
`kitout.check` on it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import kitout
from kitout.base import memory
from kitout.base.find.find import find_sites
from kitout.base.find.on_meta import on_meta
from kitout.base.survey import Block, Survey
from kitout.cli.terminal import announce_loading, report_errors
from kitout.errors import ConfigError, TargetError, suggest
from kitout.format import align_columns, format_bytes
from kitout.install_hint import suggest_install
from kitout.model_check.result import CheckCell
from kitout.runtime.left_out import fused_experts_text
from kitout.runtime.show import layers_text, site_table

HEAD_SUFFIXES = ("ForCausalLM", "ForConditionalGeneration", "ForSequenceClassification", "ForImageClassification", "")
COLUMNS = ("role", "layers", "in -> out", "sites")


def inspect(
    model_name: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="model folder, model type (llama) or timm name"),
    ],
    role: Annotated[list[str] | None, typer.Option(help="PATTERN=ROLE, as in attach(roles=...)")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="run every kind of method on a tiny batch: effect, rows, merge, save, cache")
    ] = False,
) -> None:
    """Show where adapters can be placed in a model: sites by role, layer and width. Loads no weights.

    With --check the model is built with values (the folder's, else random ones), every kind of method is tried on it,
    and the exit status is 1 if one is wrong or fails.

    Example: kitout inspect llama
    """
    with report_errors():
        roles = _parse_roles(role or [])
        announce_loading()
        model = build_on_meta(model_name)
        survey = find_sites(model, roles)
    title = f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters"
    console = Console()
    if console.is_terminal:
        console.print(render_table(survey, title))
        typer.echo("\n".join(_tower_lines(survey)))
    else:
        typer.echo(f"{title}\n{render_text(survey)}")
    if check:
        with report_errors():
            found = kitout.check(_build_with_values(model_name, model), roles=roles, on_cell=_show_cell)
        typer.echo(str(found))
        if not found.ok:
            raise typer.Exit(1)


def _show_cell(method: str, column: str, cell: CheckCell) -> None:
    typer.echo(f"{method}, {column}: {cell.text}", err=True)


def render_table(survey: Survey, title: str | None = None) -> Table:
    """Role x layers x widths x sites."""
    table = Table(title=title, title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="right" if name == "sites" else "left")
    for row in site_table(survey.sites):
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    return table


def render_text(survey: Survey) -> str:
    """The same in plain text, followed by the towers and the projections without a role."""
    return "\n".join([*align_columns([COLUMNS, *site_table(survey.sites)]), *_tower_lines(survey)])


def _tower_lines(survey: Survey) -> list[str]:
    lines = [f"tower {t.path}: {t.depth} blocks of width {t.width}{_tower_gaps(survey, t.path)}" for t in survey.towers]
    unlabeled = Counter(
        f"{re.sub(r'[0-9]+', '*', path)} [{d_in} -> {d_out}]" for path, d_in, d_out in survey.unlabeled_projections()
    )
    experts = fused_experts_text(survey)
    return [
        *lines,
        *(f"no role: {projection} x{n}" for projection, n in unlabeled.items()),
        *([experts] if experts else []),
    ]


def _tower_gaps(survey: Survey, tower: str) -> str:
    """What is missing in a tower, if anything."""
    blocks = [b for b in survey.blocks if b.tower == tower]

    def missing_layers(kind: str, is_missing: Callable[[Block], bool]) -> Iterator[str]:
        if layers := [b.index for b in blocks if is_missing(b)]:
            yield f"{kind} in {layers_text(layers)}"

    parts = [
        *missing_layers("no attention", lambda b: not b.has_attention),
        *missing_layers("projections without a role", lambda b: b.has_attention and not b.resolved),
    ]
    return f" ({'; '.join(parts)})" if parts else ""


def build_on_meta(name: str) -> nn.Module:
    """The model on the meta device: nothing is downloaded, no weight is read."""
    config = _load_config(name)
    if config is None:
        return _build_timm(name)
    with on_meta():
        return _build_transformer(config)


def _build_with_values(name: str, on_meta: nn.Module) -> nn.Module:
    """The model whose twin is on the meta device: a folder's own weights, else random ones by seed 0."""
    num_bytes = 4 * sum(p.numel() for p in on_meta.parameters())
    free = memory.available(torch.device("cpu"))
    if free is not None and num_bytes > free // 2:
        raise ConfigError(
            f"{name!r} with values takes {format_bytes(num_bytes)}, and {format_bytes(free)} are free: check a smaller "
            "config of the same type, from a folder with its config.json"
        )
    config = _load_config(name)
    torch.manual_seed(0)
    if config is None:
        return _build_timm(name, with_values=True)
    if any(Path(name).glob("*.safetensors")):
        model: nn.Module = type(on_meta).from_pretrained(name, local_files_only=True)  # type: ignore[attr-defined]
        return model
    text_config = config.get_text_config()
    if getattr(text_config, "pad_token_id", 0) is None:
        text_config.pad_token_id = 0  # some classifiers take no batch without one
    return _build_transformer(config)


def _load_config(name: str) -> Any:
    """The config in a folder, or the default one of a model type; None if it is neither."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if Path(name).is_dir():
        try:
            return AutoConfig.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{name!r} has no config that transformers can read: {error}") from error
    return CONFIG_MAPPING[name]() if name in CONFIG_MAPPING else None


def _build_transformer(config: Any) -> nn.Module:
    """With the head the config names, else the first head its type has."""
    import transformers

    names = [*(config.architectures or ()), *_class_names(config)]
    cls = next((c for name in names if (c := getattr(transformers, name, None)) is not None), None)
    try:
        return cls(config) if cls is not None else transformers.AutoModel.from_config(config)
    except Exception as error:  # whatever a model raises on a config it cannot be built from
        raise ConfigError(f"{type(config).__name__} cannot be built: {type(error).__name__}: {error}") from error


def _class_names(config: Any) -> Iterator[str]:
    stem = type(config).__name__.removesuffix("Config")
    return (f"{stem}{head}" for head in HEAD_SUFFIXES if head)


def _build_timm(name: str, with_values: bool = False) -> nn.Module:
    from transformers import CONFIG_MAPPING

    try:
        import timm
    except (ImportError, RuntimeError) as error:  # absent, or its torchvision does not fit this torch
        hint = suggest(name, list(CONFIG_MAPPING.keys()))
        fix = f"\n  {suggest_install('timm')}" if find_spec("timm") is None else ""
        raise ConfigError(
            f"{name!r} is neither a folder nor a model type ({hint}), and timm does not import: {error}{fix}"
        ) from error
    if not timm.is_model(name):
        hint = suggest(name, [*CONFIG_MAPPING.keys(), *timm.list_models()])
        raise ConfigError(f"{name!r} is neither a folder nor a model type nor a timm model; {hint}")
    model: nn.Module
    try:
        with nullcontext() if with_values else on_meta():
            model = timm.create_model(name)
    except (NotImplementedError, RuntimeError):  # it needs more than shapes to be built
        model = timm.create_model(name)
    return model


def _parse_roles(options: list[str]) -> dict[str, str]:
    """PATTERN=ROLE, where the pattern may contain '=' itself."""
    pairs = {}
    for option in options:
        pattern, equals, role = option.rpartition("=")
        if not equals:
            raise TargetError(f"--role {option!r}: write PATTERN=ROLE, for example 'mixer\\.in_proj$=attn.qkv'")
        pairs[pattern] = role
    return pairs
