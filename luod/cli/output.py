# SPDX-License-Identifier: Apache-2.0
"""How answers are printed: one JSON object for programs, tables for people; colours on terminals only."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

STATE_STYLES = {
    "finished": "green", "restored": "green", "done": "green", "ok": "green",
    "created": "cyan", "preserved": "cyan", "ready": "yellow", "preparing": "cyan", "armed": "yellow",
    "rebooting": "yellow", "retrieved": "magenta", "recovering": "magenta",
    "aborted": "bright_black", "expired": "bright_black", "lost": "red", "failed": "red",
    "in doubt": "yellow", "unknown": "yellow", "intended": "yellow",
}  # fmt: skip
"""What a state looks like on a terminal."""


def json_option(function: F) -> F:
    """Give a verb its `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(function)


def emit(value: Any) -> None:
    """Print a JSON object on a line of its own."""
    click.echo(json.dumps(value, separators=(", ", ": ")))


@functools.cache
def coloured() -> bool:
    """Say whether standard output is a terminal that wants colours."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def columns(default: int = 100) -> int:
    """Return the width of the terminal, or of what `COLUMNS` says, or `default`."""
    try:
        return int(os.environ["COLUMNS"])
    except (KeyError, ValueError):
        pass
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        return default


def paint(text: str, style: str = "") -> str:
    """Return a state or another word in its colour, on terminals that have colours."""
    colour = style or STATE_STYLES.get(text, "")
    return click.style(text, fg=colour) if colour and coloured() else text


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str = "") -> None:
    """Print rows under a head; on a terminal long cells are folded, in a pipe never."""
    shown = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if not shown:
        click.echo(empty)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, show_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in head:
        grid.add_column(name, overflow="fold", no_wrap=not sys.stdout.isatty())
    for row in shown:
        grid.add_row(*(Text(cell, style=STATE_STYLES.get(cell, "")) for cell in row))
    width = columns() if sys.stdout.isatty() else 4000
    console = Console(
        width=width, highlight=False, color_system="auto" if coloured() else None, soft_wrap=False
    )
    with console.capture() as caught:
        console.print(grid)
    click.echo("\n".join(line.rstrip() for line in caught.get().rstrip("\n").split("\n")))


def facts(pairs: Iterable[tuple[str, str]]) -> None:
    """Print names and values under each other."""
    rows = [(name, value) for name, value in pairs if value]
    wide = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        click.echo(f"{paint(f'{name:<{wide}}', 'bright_black')}  {value}")


def tell(text: str) -> None:
    """Say something beside the answer, on standard error."""
    click.echo(text, err=True)


def clock(wall_ns: int) -> str:
    """Return a wall clock time of the journal in local time, to the millisecond."""
    seconds, rest = divmod(wall_ns, 1_000_000_000)
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) + f".{rest // 1_000_000:03}"


def size(count: int) -> str:
    """Return a number of bytes in the unit that fits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count = count // 1024 if count % 1024 == 0 else count / 1024  # type: ignore[assignment]
    return f"{count:.4g} TiB"


def counts(found: dict[str, int]) -> str:
    """Return states with their numbers as a phrase."""
    return ", ".join(f"{number} {paint(state)}" for state, number in found.items()) or "none"
