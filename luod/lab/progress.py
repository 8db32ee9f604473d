# SPDX-License-Identifier: Apache-2.0
"""Showing long work: a moving line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Reporter(Protocol):
    """What a long job tells about itself."""

    def stage(self, name: str, detail: str = "") -> None:
        """Say that a stage begins; the stage before it, if any, is over."""

    def advance(self, share: float, detail: str) -> None:
        """Say how much of the stage is done: `share` is from 0 to 1, and may be an estimate."""

    def note(self, text: str) -> None:
        """Say something that stays on the screen."""


class PlainReporter:
    """One line a stage and one each 30 seconds within it: for logs and pipes."""

    interval_s = 30.0

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._began = self._spoke = time.monotonic()

    def __enter__(self) -> PlainReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def stage(self, name: str, detail: str = "") -> None:
        """Print the stage's name."""
        self._spoke = time.monotonic()
        self._print(f"{name}: {detail}" if detail else name)

    def advance(self, share: float, detail: str) -> None:
        """Print the share done when the last line is older than the interval."""
        now = time.monotonic()
        if now - self._spoke >= self.interval_s:
            self._spoke = now
            self._print(f"  {share:4.0%} {detail}")

    def note(self, text: str) -> None:
        """Print the text."""
        self._print(text)

    def _print(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f} s] {text}", file=self._stream, flush=True)


class TerminalReporter:
    """A bar for the stage that runs and a line for each that is over."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[detail]}", table_column=None),
            console=console,
        )
        self._current: TaskID | None = None

    def __enter__(self) -> TerminalReporter:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        self._progress.stop()

    def stage(self, name: str, detail: str = "") -> None:
        """Fill the last stage's bar and begin one for this stage."""
        self._finish()
        self._current = self._progress.add_task(name, total=1.0, detail=detail)

    def advance(self, share: float, detail: str) -> None:
        """Move the bar; it only fills up when the stage is over, since the share may be an estimate."""
        if self._current is not None:
            self._progress.update(self._current, completed=min(share, 0.99), detail=detail[-48:])

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(text, highlight=False)

    def _finish(self) -> None:
        if self._current is not None:
            self._progress.update(self._current, completed=1.0, detail="")


def reporter(stream: TextIO | None = None) -> PlainReporter | TerminalReporter:
    """Choose by where the output goes. Enter it as a context manager: a terminal is put right again at the end."""
    console = Console(file=stream or sys.stderr)
    return TerminalReporter(console) if console.is_terminal else PlainReporter(stream)
