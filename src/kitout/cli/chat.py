"""`kitout chat ADAPTER... | --model M`: talk to adapters, and compare them.

Only options, typing and printing here: `kitout.predict.conversation` knows who answers and what was said. In a pipe
every line is a message, and nothing is printed but answers.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kitout.cli.terminal import SIGNALED, read_any_bytes, report_errors
from kitout.errors import ConfigError, DataError, KitoutError
from kitout.format import escape_terminal

if TYPE_CHECKING:
    from kitout.predict.conversation import Conversation, Piece


def chat(
    adapters: Annotated[
        list[Path] | None, typer.Argument(metavar="[ADAPTER]...", help="folders, all on one base", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="the base: a folder or name; default: as the adapters say")] = None,
    system: Annotated[str, typer.Option(help="the system prompt; default: that of training")] = "",
    temperature: Annotated[float | None, typer.Option(help="of sampling; default: the likeliest answer")] = None,
    top_p: Annotated[float | None, typer.Option(help="of sampling")] = None,
    top_k: Annotated[int | None, typer.Option(help="of sampling")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of sampling")] = 0,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="of an answer, at most; default 256")] = None,
    save: Annotated[
        str | None, typer.Option(metavar="FILE", help="add what is said to a .jsonl that kitout train reads")
    ] = None,
    task: Annotated[str | None, typer.Option(help="what an adapter that was made without a task is for")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="of the base; default: as in training")] = None,
) -> None:
    """Chat with adapters, or with a model. /help lists what else a line can say.

    Example: kitout chat runs/a/adapter runs/b/adapter --temperature 0.7
    """
    with report_errors():
        read_any_bytes()
        if not adapters and model is None:
            raise ConfigError("name an adapter folder, or --model MODEL to chat with a model alone")
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        options = {"system": system, "seed": seed, "sampling": {k: v for k, v in sampling.items() if v is not None}}
        if max_new_tokens is not None:
            options["max_new_tokens"] = max_new_tokens
        loading = {"base": model, "task": task, "device": device, "dtype": dtype}
        conversation = _open(adapters or [], loading, options)
        with _locked(save):
            _Screen(conversation, save).run()


def _open(adapters: list[Path], loading: dict[str, Any], options: dict[str, Any]) -> Conversation:
    """Whoever cannot chat is refused before a model is loaded."""
    from kitout.predict.conversation import Conversation
    from kitout.predict.saved_adapters import check_writes, read_folders

    saved = read_folders(adapters, verify=True)
    check_writes(saved, loading["task"])
    name = ", ".join(one.name for one in saved) or loading["base"]
    typer.echo(f"loading {name} ...", err=True)
    import kitout

    return Conversation(kitout.load(*(one.folder for one in saved), **loading), **options)


class _Screen:
    """What is typed and what is shown. save: a file that gets every answer as soon as it is there."""

    def __init__(self, conversation: Conversation, save: str | None) -> None:
        self.conversation, self.save = conversation, save
        self.is_typed = sys.stdin.isatty() and sys.stdout.isatty()
        self.has_failed = self.has_shown = False
        self._before = _read(save) if save else ""

    def run(self) -> None:
        """Until the last line, /quit, Ctrl-D or a second Ctrl-C."""
        from kitout.train.loop.stop_on_signal import interrupt_on_sigterm

        for remark in self.conversation.remarks:
            self._note(remark)
        if self.is_typed:
            self._note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends")
        was_stopped = False
        with interrupt_on_sigterm():
            while not self.conversation.has_ended:
                try:
                    line = self._read_line()
                    if line is None:
                        break
                    self._show(self.conversation.say(line))
                    was_stopped = False
                except KitoutError as error:
                    self._report(error)
                except KeyboardInterrupt as stopped:
                    number = stopped.args[0] if stopped.args else signal.SIGINT
                    if was_stopped or number != signal.SIGINT:
                        self._keep()
                        raise typer.Exit(SIGNALED + number) from None
                    was_stopped = True
                    self._note("\nstopped; Ctrl-C once more, Ctrl-D or /quit ends")
                self._keep()
        if self.has_failed and not self.is_typed:
            raise typer.Exit(1)

    def _read_line(self) -> str | None:
        if not self.is_typed:
            line = sys.stdin.readline()
            if any("\udc80" <= char <= "\udcff" for char in line):
                raise DataError("a line holds bytes that are no UTF-8 text")
            return line or None
        with suppress(ImportError):  # not on Windows
            import readline as _history  # noqa: F401 - input() then has arrows and a history
        try:
            return input(f"[{', '.join(self.conversation.speakers)}] > ")
        except EOFError:
            typer.echo()
            return None

    def _show(self, pieces: Iterator[Piece]) -> None:
        is_open = False
        try:
            for piece in pieces:
                if not piece.speaker:
                    if is_open:
                        typer.echo()
                        is_open = False
                    self._note(piece.text)
                    continue
                if piece.is_first:
                    if is_open:
                        typer.echo()
                    if self.has_shown:
                        typer.echo()  # an empty line between answers
                    self.has_shown = is_open = True
                    if len(self.conversation.speakers) > 1:
                        typer.echo(f"{piece.speaker}: ", nl=False)
                typer.echo(escape_terminal(piece.text), nl=False)
                sys.stdout.flush()
        finally:
            pieces.close()  # type: ignore[attr-defined]  # it is a generator: the model stops
            if is_open:
                typer.echo()

    def _note(self, text: str) -> None:
        if text:
            typer.echo(escape_terminal(text), err=not self.is_typed)

    def _keep(self) -> None:
        """Writes what was said. A full disk is said, and the chat goes on: it can be saved elsewhere with /save."""
        if self.save and self.conversation.examples():
            try:
                self.conversation.save(self.save, self._before)
            except KitoutError as error:
                self._report(error)

    def _report(self, error: Exception) -> None:
        self.has_failed = True
        typer.echo(f"error: {escape_terminal(str(error))}", err=True)


@contextmanager
def _locked(file: str | None) -> Iterator[None]:
    """Two chats that keep one file would each write over what the other has said."""
    if file is None:
        yield
        return
    from filelock import FileLock, Timeout

    from kitout.files.system_errors import as_path, as_path_error

    path = as_path(file)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with as_path_error("written", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise ConfigError(f"--save {file}: another chat is writing it; name another file") from None
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)


def _read(file: str) -> str:
    """What an earlier chat has written; a file that cannot be written is an error before the first line."""
    from kitout.files.system_errors import as_path, as_path_error

    path = as_path(file)
    with as_path_error("written", path):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            return ""
        try:
            before = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"--save {file}: it is no UTF-8 text, so no chat that can be continued") from error
    return before if before.endswith("\n") or not before else before + "\n"
