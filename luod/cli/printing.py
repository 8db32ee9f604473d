# SPDX-License-Identifier: Apache-2.0
"""What luoctl prints: JSON for programs, text and tables for people.

Text of clients (labels, messages, reasons) may hold anything; nothing of it reaches a terminal as a control character.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

WIDE = 200
"""Columns of what no terminal limits."""

STYLES = {
    "finished": "green", "done": "green", "ok": "green", "ready": "cyan", "restored": "cyan", "armed": "cyan",
    "preserved": "cyan", "retrieved": "cyan", "created": "cyan", "rebooting": "yellow", "preparing": "yellow",
    "recovering": "yellow", "IN DOUBT": "yellow", "unknown": "yellow", "busy": "yellow", "aborted": "magenta",
    "voided": "magenta", "expired": "magenta", "lost": "bold red", "failed": "bold red", "absent": "red", "disabled": "red",
    "broken": "bold red", "denied": "red", "gone": "bold red",
}  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def print_json(data: Any) -> None:
    """Print one line of JSON, ASCII only."""
    sys.stdout.write(json.dumps(data, separators=(",", ":")) + "\n")


def clean(text: object) -> str:
    """Return text without control characters: they are shown escaped."""
    plain = str(text)
    if plain.isprintable():
        return plain
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in plain)


def width() -> int:
    """Return the columns to fill: those of the terminal or $COLUMNS; plenty where neither says."""
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return max(shutil.get_terminal_size((WIDE, 24)).columns, 40)
    return WIDE


def colored() -> bool:
    """Say whether colours are wanted: on a terminal, unless $NO_COLOR is set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def console() -> Console:
    """Return where tables are printed; it takes text literally."""
    from rich.console import Console

    return Console(
        file=sys.stdout, width=width(), markup=False, highlight=False, emoji=False, force_terminal=colored(),
        color_system="standard" if colored() else None, legacy_windows=False,
    )  # fmt: skip


def tinted(word: str, text: str | None = None) -> str:
    """Return text in the colour of a state."""
    shown = clean(word if text is None else text)
    style = STYLES.get(word, "")
    if not style or not colored():
        return shown
    return click.style(shown, fg=style.removeprefix("bold "), bold=style.startswith("bold") or None)


def cell(value: object) -> Text:
    """Return a cell of a table; a state is shown in its colour."""
    from rich.text import Text

    text = clean(value)
    return Text(text, style=STYLES.get(text, ""), overflow="fold")


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = (), indent: int = 0
) -> None:
    """Print a table; `right` names the columns that stand to the right."""
    from rich.padding import Padding
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(cell(value) for value in row))
    out = console()
    with out.capture() as captured:
        out.print(Padding(made, (0, 0, 0, indent)))
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def wrapped(text: str, *, first: str = "", rest: str = "", plain_first: str | None = None) -> str:
    """Fill text into the width behind `first`, further lines behind `rest`; `plain_first` is `first` without its colours."""
    lead = first if plain_first is None else plain_first
    lines = textwrap.wrap(
        " ".join(clean(text).split()), width(), initial_indent=lead, subsequent_indent=rest, break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip
    if not lines:
        return first.rstrip()
    lines[0] = first + lines[0][len(lead) :]
    return "\n".join(lines)


def clock(wall_ns: int) -> str:
    """Return a wall clock time of the day, in local time, to the millisecond."""
    return time.strftime("%H:%M:%S", time.localtime(wall_ns // 10**9)) + f".{wall_ns // 10**6 % 1000:03d}"


def day(wall_ns: int) -> str:
    """Return a date, in local time."""
    return time.strftime("%Y-%m-%d", time.localtime(wall_ns // 10**9))


def duration(seconds: float) -> str:
    """Return a duration with its unit."""
    if seconds < 0:
        return "-" + duration(-seconds)
    if seconds == 0:
        return "0 ms"
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return (
        f"{minutes} min {int(seconds % 60)} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
    )


def size(count: int) -> str:
    """Return a number of bytes with a binary unit."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"


def number(count: int, noun: str) -> str:
    """Return a count and its noun, in the plural where it must be."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return names as an enumeration; of many only the first."""
    shown = [clean(name) for name in names]
    if len(shown) > most:
        return f"{', '.join(shown[:most])} and {len(shown) - most} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown) or "none"
