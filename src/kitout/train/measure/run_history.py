"""What worked before: one row for each adapter of every finished run, in `runs.sqlite` of the user's data folder.

A row is numbers and names of settings: the model's shape, the task, how many examples, the design, what it gained over
the base and what it cost. Nothing of the data, no path and no name that a user gave. A file that is locked, full or
damaged is one warning and never an error of the run. It knows the results of a run, and nothing of what reads the rows.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import astuple, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from platformdirs import user_data_path

from kitout.errors import ConfigError, FileError
from kitout.format import short_repr
from kitout.version import __version__

if TYPE_CHECKING:
    import sqlite3

    from kitout.base.survey import Tower
    from kitout.evaluate.compare import Comparison
    from kitout.method import Method
    from kitout.train.config.schema import RunConfig
    from kitout.train.loop.jobs import Job
    from kitout.train.setup.prepare import PreparedRun

HISTORY_FILE = "runs.sqlite"
VARIABLE = "KITOUT_RUNS"
FORMAT = 1  # the file's user_version
LOCK_SECONDS = 10.0  # that a row waits for other processes, which write theirs
OFF, ON = ("off", "0", "no", "false"), ("", "on", "1", "yes", "true")
SELECTIONS = ("targets", "layers", "names", "places", "part")  # texts of a method that name parts of a model alone


@dataclass(frozen=True)
class ModelShape:
    """A base by its size, not by its name."""

    kind: str
    """The model type that its config names, such as "llama"; empty where it has none."""
    depth: int
    """Blocks of all towers."""
    width: int
    """Of the widest residual stream."""
    parameters: int
    """Of the base."""

    @classmethod
    def of(cls, towers: Sequence[Tower], config: Any, parameters: int) -> ModelShape:
        """config: the model's own."""
        kind = str(getattr(config, "model_type", "") or "")
        return cls(kind, sum(t.depth for t in towers), max((t.width for t in towers), default=0), parameters)


@dataclass(frozen=True)
class HistoryRow:
    """One adapter of a finished run. The fields are the columns of the file."""

    run: str
    """The same for all adapters of one run: drawn at random."""
    day: str
    """When it finished, such as 2026-11-30."""
    version: str
    """Of kitout."""
    source: str
    """What trained it: "train", "align" or "search"."""
    model_kind: str
    """`ModelShape.kind`."""
    depth: int
    """`ModelShape.depth`."""
    width: int
    """`ModelShape.width`."""
    parameters: int
    """`ModelShape.parameters`."""
    task: str
    """The objective."""
    examples: int | None
    """How many there were to train on; None of a stream."""
    design: str
    """JSON: the method, its settings, the learning rate, steps and batch size."""
    seed: int
    """train.seed."""
    metric: str
    """The headline metric; empty without a test split."""
    baseline: str
    """What the gain is over: the base, or a constant answer where the base has an untrained head."""
    score: float | None
    """On the test split."""
    gain: float | None
    """Score minus the baseline's."""
    low: float | None
    """Lower end of the gain's 95 % interval."""
    high: float | None
    """Upper end of it."""
    higher_is_better: bool
    """Of the metric."""
    is_share: bool
    """The score is a fraction between 0 and 1."""
    num_test: int
    """Test examples."""
    diverged: bool
    """Training stopped because it diverged."""
    trainable: int
    """Trainable parameters, heads included."""
    seconds: float
    """Of training, this adapter's own forwards and backwards."""
    memory: int
    """Peak of the whole run, in bytes."""
    device: str
    """"cpu" or "cuda"."""
    dtype: str
    """Of the base."""


COLUMNS = tuple(field.name for field in fields(HistoryRow))


def history_file() -> Path | None:
    """Where the rows are kept, whether or not there are any; None: KITOUT_RUNS=off.

    KITOUT_RUNS may also name another folder, by an absolute path. ConfigError for anything else.
    """
    value = os.environ.get(VARIABLE, "").strip()
    if value.lower() in OFF:
        return None
    if value.lower() in ON:
        return Path(user_data_path("kitout", appauthor=False)) / HISTORY_FILE
    folder = Path(value).expanduser()
    if not folder.is_absolute():
        raise ConfigError(f"{VARIABLE}={short_repr(value)}: write off, on, or the absolute path of a folder")
    return folder / HISTORY_FILE


def record_run(
    run: PreparedRun, config: RunConfig, results: Mapping[str, Any], comparisons: Mapping[str, Comparison],
    log: Callable[[str], None], source: str = "train",
) -> None:  # fmt: skip
    """Keeps a finished run's rows. Whatever prevents it is one line, and the run is as finished as without."""
    try:
        file = history_file()
        if file is None:
            return
        is_first = append_rows(file, rows_of_run(run, config, results, comparisons, source))
    except Exception as error:  # a run of hours does not fail for a row about it
        log(f"warning: this run leaves no row for `kitout advise`: {error} ({VARIABLE}=off keeps none)")
        return
    if is_first:
        log(
            f"kept in {file} for `kitout advise`: a row about every run (model shape, task, number of examples, "
            f"design, scores, cost; nothing of the data, no names); {VARIABLE}=off keeps none"
        )


def rows_of_run(
    run: PreparedRun, config: RunConfig, results: Mapping[str, Any], comparisons: Mapping[str, Comparison], source: str
) -> list[HistoryRow]:
    """results: what results.json holds. The method is the one that was asked for, whatever training made of it."""
    from kitout.runtime.count import num_base_parameters

    kit, key, day = run.kit, uuid.uuid4().hex, f"{datetime.now(timezone.utc):%Y-%m-%d}"
    shape = ModelShape.of(kit.survey.towers, getattr(kit.base, "config", None), num_base_parameters(kit.base))
    costs = {row["name"]: row for row in results["adapters"]}
    rows = []
    for job, data, job_config in zip(run.jobs, run.datasets, config.per_job(), strict=True):
        change = comparisons[job.name].changes[0] if job.name in comparisons else None
        rows.append(HistoryRow(
            run=key, day=day, version=__version__, source=source,
            model_kind=shape.kind, depth=shape.depth, width=shape.width, parameters=shape.parameters,
            task=run.objective,
            examples=None if data.preview else len(data.train),
            design=json.dumps(design_of(job_config.method, job, results["steps"]), sort_keys=True),
            seed=job.settings.seed,
            metric=change.name if change else "",
            baseline=change.baseline if change else "",
            score=_finite(change.tuned.value) if change else None,
            gain=_finite(change.difference) if change else None,
            low=_finite(change.low) if change else None,
            high=_finite(change.high) if change else None,
            higher_is_better=change.base.higher_is_better if change else True,
            is_share=change.base.share if change else False,
            num_test=change.base.n if change else 0,
            diverged=job.name in results["stopped"],
            trainable=int(results["trainable"][job.name]),
            seconds=float(costs[job.name]["seconds"]),
            memory=int(results["memory"]),
            device=kit.device.type,
            dtype=str(results["machine"]["dtype"]),
        ))  # fmt: skip
    return rows


def design_of(method: Method, job: Job, steps: int) -> dict[str, Any]:
    """The method with the settings that are not its defaults, and how it was trained.

    Of the settings what is a number, a choice of the method's own or a selection of parts of the model: an initial text
    or the names of other adapters stay out.
    """
    values = method.model_dump(mode="json", exclude_defaults=True)
    settings = {name: value for name, value in values.items() if _is_impersonal(method, name, value)}
    lr = job.settings.lr if job.settings.lr is not None else method.training_defaults().lr
    return {
        "method": type(method).__name__,
        "settings": settings,
        "lr": lr,
        "steps": min(steps, len(job.batches)),
        "batch_size": max(map(len, job.batches), default=0),
    }


def _is_impersonal(method: Method, name: str, value: object) -> bool:
    if value is None or isinstance(value, bool | int | float) or name in SELECTIONS:
        return True
    if isinstance(value, Mapping):  # by role or by path
        return all(isinstance(one, int | float) for one in value.values())
    return value in _literals(type(method).model_fields[name].annotation) if isinstance(value, str) else False


def _literals(annotation: Any) -> list[Any]:
    """The words that a setting allows."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for part in get_args(annotation) for word in _literals(part)]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def append_rows(file: Path, rows: Sequence[HistoryRow]) -> bool:
    """Adds rows, all of them or none; True if they are the file's first. Several processes may do so at once."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not file.exists():
        with suppress(FileExistsError):  # another process has just made it
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    elif file.stat().st_mode & 0o077:
        file.chmod(0o600)
    with _opened(file) as connection:
        connection.execute("BEGIN IMMEDIATE")
        try:
            is_first = _check_format(connection) == 0
            if is_first:
                connection.execute(f"CREATE TABLE runs ({', '.join(COLUMNS)})")
                connection.execute(f"PRAGMA user_version = {FORMAT}")
            places = ", ".join("?" * len(COLUMNS))
            connection.executemany(
                f"INSERT INTO runs ({', '.join(COLUMNS)}) VALUES ({places})", [astuple(row) for row in rows]
            )
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
    return is_first


def read_rows(file: Path) -> list[HistoryRow]:
    """All rows, oldest first; none where there is no file. FileError where it cannot be read."""
    if not file.is_file():
        return []
    with _opened(file) as connection:
        if _check_format(connection) == 0:
            return []
        found = connection.execute(f"SELECT {', '.join(COLUMNS)} FROM runs ORDER BY rowid").fetchall()
    flags = {COLUMNS.index(name) for name in ("higher_is_better", "is_share", "diverged")}
    values: list[Any] = [[bool(v) if i in flags else v for i, v in enumerate(row)] for row in found]
    return [HistoryRow(*row) for row in values]


def _check_format(connection: sqlite3.Connection) -> int:
    """The file's format; 0 of a new one. FileError for one of a later version."""
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    if found > FORMAT:
        raise FileError("a later version of kitout wrote it: update kitout")
    return int(found)


@contextmanager
def _opened(file: Path) -> Iterator[sqlite3.Connection]:
    """A connection without transactions of its own. FileError names the file and what to do.

    The rollback journal stays sqlite's default: a kill at any moment leaves the rows of before, and unlike WAL it also
    works on network file systems.
    """
    import sqlite3

    try:
        with closing(sqlite3.connect(file, timeout=LOCK_SECONDS, isolation_level=None)) as connection:
            yield connection
    except sqlite3.OperationalError as error:  # locked, full, or not to be written
        raise FileError(f"{file}: {error}") from error
    except sqlite3.DatabaseError as error:
        raise FileError(f"{file} is damaged ({error}): delete it, and a new one is begun") from error
    except FileError as error:
        raise FileError(f"{file}: {error}") from error
