"""`kitout align RUN.YAML|KIND [name=value ...]`: train on preferences and rewards, in stages or one stage alone.

Only options here; `kitout.align.run` does the work. The settings in --help, --example and --json-schema come from the
config's own schema, for a kind only those that it has. An interrupted run resumes from its last checkpoint when the
same command is given again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kitout.cli.terminal import indent, print_settings, refuse_options, report_errors, report_interrupt

EXAMPLES = """\
kitout align --example > run.yaml; kitout align run.yaml stages.ppo.loss.beta=0.1
kitout align dpo --model smollm2-135m --data nq-pairs --out runs/dpo loss.beta=0.2 --dry-run
kitout align reward --model MODEL --data pairs.jsonl --from runs/sft/adapter --out runs/reward
kitout align grpo --model MODEL --data gym:chain_sum --reward gym:chain_sum --out runs/grpo train.steps=100
kitout align ppo --model MODEL --data prompts.jsonl --reward runs/reward/adapter --out runs/ppo"""

OPTIONS = ("--model", "--data", "--method", "--from", "--reward", "--out", "--dry-run", "--example", "--help",
           "--json-schema")  # fmt: skip
# The verb prints its own help: typer's own, then every setting. It says itself what to write for an unknown option.
CONTEXT_SETTINGS: dict[str, Any] = {"help_option_names": [], "ignore_unknown_options": True}


def align(
    context: typer.Context,
    args: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN.YAML|KIND|NAME=VALUE",
            help="a file with stages, or the kind of one stage (sft, reward, dpo, orpo, simpo, kto, grpo, rloo, ppo); "
            "and settings by dotted name",
            show_default=False,
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="short for model.name=...")] = None,
    data: Annotated[str | None, typer.Option(help="short for data.train=..., of one stage")] = None,
    method: Annotated[str | None, typer.Option(help="short for method=...; `kitout methods` lists them")] = None,
    from_: Annotated[str | None, typer.Option("--from", help="short for from=...: start from an adapter")] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(metavar="FOLDER|module:fn|gym:NAME", help="short for reward=...; may be given again"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="short for output.folder=...")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the pre-flight, train nothing")] = False,
    example: Annotated[
        bool, typer.Option("--example", help="print a run.yaml to start from; of a KIND alone too")
    ] = False,
    json_schema: Annotated[bool, typer.Option("--json-schema", help="print the JSON schema of a run.yaml")] = False,
    help_: Annotated[bool, typer.Option("--help", help="show this and every setting; of a KIND those it has")] = False,
) -> None:
    """Train on preferences and rewards: reward models, DPO, ORPO, SimPO, KTO, GRPO, RLOO, PPO."""
    words = list(args or [])
    with report_errors(), report_interrupt():
        kind = _take_kind(words)
        if help_ or not (words or kind or example or json_schema or any((model, data, method, from_, reward, out))):
            _print_help(context, kind)
        elif example:
            from kitout.align.config.describe import kind_yaml, stages_yaml

            typer.echo(kind_yaml(kind) if kind else stages_yaml(), nl=False)
        elif json_schema:
            from kitout.align.config.schema import AlignConfig

            typer.echo(json.dumps(AlignConfig.model_json_schema(), indent=2, ensure_ascii=False))
        else:
            options = {"model.name": model, "data.train": data, "method": method, "from": from_}
            shorthands: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
            shorthands |= {"output.folder": str(out)} if out is not None else {}
            shorthands |= {"reward": reward} if reward else {}
            _run_stages(words, kind, shorthands, dry_run)


def _take_kind(words: list[str]) -> str | None:
    """The kind of one stage, taken out of the words."""
    from kitout.align.config.kinds import KINDS

    return words.pop(0) if words and words[0] in KINDS else None


def _run_stages(words: list[str], kind: str | None, shorthands: dict[str, Any], dry_run: bool) -> None:
    from kitout.align.config.load import build_align
    from kitout.align.config.schema import KIND_ADVICE, AlignConfig, StageConfig
    from kitout.errors import ConfigError
    from kitout.train.config import overrides

    unknown = [word for word in words if word.startswith("-")]
    refuse_options(unknown, OPTIONS, StageConfig if kind else AlignConfig, KIND_ADVICE.of(kind) if kind else None)
    files = [word for word in words if not overrides.is_override(word)]
    if kind is None:
        _check_files(files)
    if len(files) > 1:
        raise ConfigError(f"one run.yaml at a time, not {', '.join(files)}; write a setting as name=value")
    settings: list[overrides.Override | str] = [*shorthands.items(), *filter(overrides.is_override, words)]
    config = build_align(Path(files[0]) if files else None, settings, kind, typer.echo)
    from kitout.align.start import start

    start(config, dry_run=dry_run, log=typer.echo)


def _check_files(files: list[str]) -> None:
    """ConfigError where neither a file nor a kind is named."""
    from kitout.align.config.kinds import KINDS
    from kitout.errors import ConfigError, suggest

    if not files:
        raise ConfigError(f"a run.yaml is required, or a kind ({', '.join(KINDS)})\n{indent(EXAMPLES)}")
    if not Path(files[0]).exists() and Path(files[0]).suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"there is no kind of stage {files[0]!r}, and no file: {suggest(files[0], KINDS, len(KINDS))}"
        )


def _print_help(context: typer.Context, kind: str | None) -> None:
    from kitout.align.config.describe import EXAMPLE_DATA, align_sections, kind_sections
    from kitout.align.config.kinds import KINDS
    from kitout.data.examples.format_table import FORMATS

    typer.echo(context.get_help())
    typer.echo("\nKinds of stages; `kitout align KIND --help` has the settings of one:" if kind is None else "")
    for name, entry in KINDS.items():
        if kind in (None, name):
            data_format = FORMATS.get(entry.data_format)
            typer.echo(f"  {name:<7} {entry.title}")
            if kind is not None and data_format is not None:
                typer.echo(f"          data: {data_format}")
    typer.echo()
    print_settings(align_sections() if kind is None else kind_sections(kind))
    examples = EXAMPLES
    if kind is not None:
        reward = f" --reward {EXAMPLE_DATA['prompts']}" if KINDS[kind].takes_reward else ""
        data = EXAMPLE_DATA[KINDS[kind].data_format]
        examples = (
            f"kitout align {kind} --model MODEL --data {data}{reward} --out runs/{kind}\n"
            f"kitout align {kind} --example > run.yaml; kitout align run.yaml"
        )
    typer.echo(f"Examples:\n{indent(examples)}")
