"""`kitout eval ADAPTER... --data SOURCE`: adapters and their base on the same examples, with intervals.

Only options and printing here: `kitout.load` finds the base, `kitout.assess.run` measures.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from kitout.cli.terminal import report_errors

LINE_SECONDS = 30.0  # between lines of progress
RESULTS, TABLE, PAGE = "results.json", "results.txt", "report.html"
ANSWERS = "answers"  # the folder with what adapters have answered so far


def eval(  # noqa: A001 - the verb
    adapters: Annotated[
        list[Path] | None, typer.Argument(metavar="ADAPTER...", help="adapter folders, all for one base; or --model")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="a file, folder or built-in set; may be given again (#200: 200 rows)"),
    ] = None,
    suite: Annotated[str, typer.Option(metavar="none|quick|full", help="measure forgetting on built-in sets")] = "none",
    model: Annotated[str | None, typer.Option(help="the base: a folder or name; default: as the adapters say")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="examples of each source, sampled by the seed")] = None,
    group: Annotated[str | None, typer.Option(metavar="COLUMN", help="rows with one value here count as one")] = None,
    cost: Annotated[bool, typer.Option("--cost", help="time base and adapters, prefill and decoding apart")] = False,
    spectrum: Annotated[bool, typer.Option("--spectrum", help="count intruder dimensions of the weights")] = False,
    harness: Annotated[
        list[Path] | None,
        typer.Option(metavar="TASK.yaml", help="a task of lm-evaluation-harness; may be given again"),
    ] = None,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="tasks may run Python of their own")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help=f"write {RESULTS}, {TABLE} and {PAGE} into this folder")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    seed: Annotated[int, typer.Option(help="of samples and intervals")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="ask base and adapters anew, and keep no answers")] = False,
    task: Annotated[str | None, typer.Option(help="what adapters that were made without a task are for")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="of the base; default: as in training")] = None,
) -> None:
    """Measure adapters against their base: quality on your data, forgetting, cost, each with intervals.

    Tables with question, choices and answer are scored as lm-evaluation-harness does,
    plain texts by bits per byte, all else as `kitout train` evaluates its test split.

    Example: kitout eval runs/a/adapter runs/b/adapter --data test.jsonl --suite quick
    """
    with report_errors():
        from kitout.errors import ConfigError

        if not adapters and model is None:
            raise ConfigError("name adapter folders, or a model: kitout eval --model MODEL --data FILE")
        if out is not None:
            if out.exists() and not out.is_dir():
                raise ConfigError(f"--out {out} is a file: name a folder")
            try:
                out.mkdir(parents=True, exist_ok=True)  # before what takes long
            except OSError as error:
                raise ConfigError(f"--out {out} cannot be made ({error.strerror}): name another folder") from None
        import kitout
        from kitout.assess import run

        typer.echo("loading the base ...", err=True)
        predictor = kitout.load(*(adapters or ()), base=model, task=task, device=device, dtype=dtype)
        sources: list[Any] = [{"path": path, **({} if limit is None else {"limit": limit})} for path in data or ()]
        assessment = run(
            predictor.kit,
            predictor.loaded,
            sources,
            suite=suite,
            cost=cost,
            spectrum=spectrum,
            harness=harness or (),
            allow_code=allow_code,
            tokenizer=predictor.tokenizer,
            pixels=predictor.preprocessing.pixels,
            usages=predictor.usages,
            group=group,
            folders=predictor.folders,
            seed=seed,
            keep_base=not fresh,
            keep_in=None if out is None or fresh else out / ANSWERS,
            log=lambda line: typer.echo(line, err=True),
            on_progress=_Progress(),
        )
        results = json.dumps(assessment.to_dict(), indent=2, ensure_ascii=False)
        typer.echo(results if as_json else str(assessment))  # first: a full disk loses nothing that was measured
        if out is not None:
            from kitout.files.atomic import write_text

            write_text(out / RESULTS, f"{results}\n")
            write_text(out / TABLE, f"{assessment}\n")
            write_text(out / PAGE, assessment.to_html())
            typer.echo(f"written: {out / RESULTS}, {out / TABLE}, {out / PAGE}", err=True)


class _Progress:
    """A line now and then."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __call__(self, name: str, done: int, total: int) -> None:
        if time.monotonic() - self.last >= LINE_SECONDS:
            self.last = time.monotonic()
            typer.echo(f"{name}: {done:,} of {total:,} examples", err=True)
