"""What a chat shows: Markdown and bars on a terminal, plain text in a pipe."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

from ..support.printing import layer_bars, megabytes
from .answers import Answer, Piece
from .conversation import Memory

if TYPE_CHECKING:
    from ..plan.report import KVReport
    from ..support import progress

_DRAW_SECONDS = 0.05  # least time between two drawings of an answer
_STEPS = {"reading": "Reading", "scoring": "Scoring"}


def visible(text: str) -> str:
    """``text`` without characters that a terminal takes for orders: control characters become visible signs."""
    return "".join(c if c in "\n\t" or not _is_control(c) else _sign(c) for c in text.replace("\r\n", "\n"))


def _is_control(c: str) -> bool:
    return c < " " or "\x7f" <= c <= "\x9f"


def _sign(c: str) -> str:
    if c < " ":
        return chr(0x2400 + ord(c))  # the block of control pictures
    return "\u2421" if c == "\x7f" else "\ufffd"


class Screen:
    """Where answers, notes and progress go.

    Args:
        out: answers.
        err: everything else.
    """

    def __init__(self, out: Console, err: Console) -> None:
        self._out, self._err = out, err

    @property
    def is_terminal(self) -> bool:
        """Whether answers are shown as Markdown while they come."""
        return self._out.is_terminal

    def note(self, text: str, has_path: bool = False) -> None:
        """Say something quietly; a path in it is not divided into lines, so that it can be copied."""
        self._err.print(Text(visible(text), style="dim"), soft_wrap=has_path or not self._err.is_terminal)

    def error(self, error: BaseException | str) -> None:
        """Say what went wrong."""
        message = " ".join(str(error).split())
        self._err.print(Text(f"error: {visible(message)}", style="red"), soft_wrap=not self._err.is_terminal)

    def show(self, renderable: RenderableType) -> None:
        """Print a table or bars."""
        self._err.print(renderable)

    def memory(self, memory: Memory, report: KVReport | None) -> None:
        """Show what every layer keeps, and the figures of the whole cache."""
        if report is not None:
            self.show(layer_bars(report.n_kept.tolist(), report.n_tokens))
            if report.scoring:
                self.note(f"Scores: {report.scoring}.")
        later = memory.n_tokens - memory.n_context
        self.note(
            f"{memory.n_context:,} tokens are compressed, {later:,} later ones are kept in full. "
            f"The cache holds {megabytes(memory.n_bytes)} instead of {megabytes(memory.n_bytes_full)}, and has "
            f"{megabytes(memory.n_bytes_allocated)} allocated with the room for new tokens."
        )

    def figures(self, answer: Answer, memory: Memory) -> None:
        """One quiet line below an answer, if somebody looks."""
        if not self._err.is_terminal:
            return
        parts = [
            f"{memory.n_tokens:,} tokens",
            f"{megabytes(memory.n_bytes)} instead of {megabytes(memory.n_bytes_full)}",
        ]
        if answer.tokens_per_second:
            parts.append(f"{answer.tokens_per_second:.1f} tokens/s")
        if answer.end == "finished" and not answer.text.strip():
            parts.append("the model gave no answer")
        parts += {
            "stopped": ["stopped"],
            "max_tokens": [f"cut after {answer.n_tokens:,} tokens (--max-tokens)"],
            "context": ["cut because the context is full (/clear, or --ctx-size)"],
        }.get(answer.end, [])
        self.note(" · ".join(parts))

    def answer(self, pieces: Iterable[Piece]) -> None:
        """Show an answer while it comes."""
        if self._out.is_terminal:
            with MarkdownStream(self._out) as stream:
                for piece in pieces:
                    stream.add(visible(piece.text), piece.is_thought)
            return
        for piece in pieces:
            if not piece.is_thought:
                self._out.file.write(visible(piece.text))
                self._out.file.flush()
        self._out.file.write("\n")
        self._out.file.flush()

    def gap(self) -> None:
        """An empty line before the next question or answer."""
        self._out.print()

    @contextlib.contextmanager
    def progress(self) -> Iterator[Callable[[progress.Progress], None]]:
        """A function that shows how far reading and scoring are, with a bar for each; nothing in a pipe."""
        if not self._err.is_terminal:
            yield lambda progress: None
            return
        columns = (
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(),
            TextColumn("{task.completed:,}/{task.total:,}"), _Speed(), TextColumn("{task.fields[memory]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        )  # fmt: skip
        bars = Progress(*columns, console=self._err, transient=True)
        tasks: dict[str, TaskID] = {}

        def show(progress: progress.Progress) -> None:
            if progress.step not in tasks:
                bars.start()  # not before: most questions need no reading
                tasks[progress.step] = bars.add_task(_STEPS[progress.step], total=progress.n_total, memory="")
            memory = f"cache {megabytes(progress.kv_bytes)}"
            bars.update(tasks[progress.step], completed=progress.n_done, total=progress.n_total, memory=memory)

        try:
            yield show
        finally:
            bars.stop()


class _Speed(ProgressColumn):
    """Tokens per second."""

    def render(self, task: Task) -> Text:
        """See ``ProgressColumn.render``."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} tokens/s", style="progress.data.speed")


class MarkdownStream:
    """Markdown that grows on a terminal.

    Blocks that are whole are printed for good, so that an answer may be longer than the screen; the last block is drawn
    again with every change.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._parser = MarkdownIt().enable("strikethrough").enable("table")  # as rich.markdown
        self._text = ""
        self._is_thought = False
        self._is_first = True
        # drawn by this thread alone: rich's own thread may draw while a block is printed, and then counts lines wrongly
        self._live = Live(Text("…", style="dim"), console=console, auto_refresh=False, vertical_overflow="crop")
        self._drawn = 0.0

    def __enter__(self) -> MarkdownStream:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._live.transient = True
        self._live.update(Group())
        self._live.stop()
        self._print(self._text)

    def add(self, text: str, is_thought: bool = False) -> None:
        """Show more of it."""
        if is_thought != self._is_thought:
            self._print(self._text)
            self._text, self._is_thought = "", is_thought
        self._text += text
        whole, self._text = self._divided()
        self._print(whole)
        self._live.update(_LastLines(self._rendered(self._text)))
        if time.monotonic() - self._drawn > _DRAW_SECONDS:
            self._live.refresh()
            self._drawn = time.monotonic()

    def _divided(self) -> tuple[str, str]:
        """The blocks that are whole, and the last one, which may go on."""
        if self._is_thought:
            whole, newline, rest = self._text.rpartition("\n")
            return whole + newline, rest
        starts = [token.map[0] for token in self._parser.parse(self._text) if token.level == 0 and token.map]
        if not starts or not starts[-1]:
            return "", self._text
        lines = self._text.splitlines(keepends=True)
        return "".join(lines[: starts[-1]]), "".join(lines[starts[-1] :])

    def _print(self, text: str) -> None:
        if not text.strip():
            return
        self._live.update(Group())  # what is printed was drawn there
        if not self._is_first and not self._is_thought:
            self._console.print()
        self._is_first = False
        self._console.print(self._rendered(text))

    def _rendered(self, text: str) -> RenderableType:
        if self._is_thought:
            return Text(text.strip("\n"), style="dim italic")
        return Markdown(text, hyperlinks=False)  # a link's address would be an escape sequence that the model wrote


class _LastLines:
    """The end of something that may be higher than the screen."""

    def __init__(self, renderable: RenderableType) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._renderable, options, pad=False)
        for line in lines[-max(1, console.height - 2) :]:
            yield from line
            yield Segment.line()
