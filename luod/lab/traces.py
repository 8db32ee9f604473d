# SPDX-License-Identifier: Apache-2.0
"""What luod left on the state disk of a run: its journal as it was at the end of each boot, and the timeline drawn from the last."""

from __future__ import annotations

from pathlib import Path

from ..engine.book import Book
from ..journal.replay import Replay
from ..states.errors import LuodError
from ..timeline import draw_book

RECORDS = 8
LINES = 12
BODY = 100


def journals(state: Path) -> list[Path]:
    """Return the journals of a run, earlier boots first."""
    return [*sorted(state.glob("luod-after-boot-*/journal.db")), *state.glob("luod/journal.db")]


def draw(directory: Path) -> None:
    """Write `timeline.txt` next to the console log when the run has left a journal that can be read."""
    for journal in journals(directory / "state")[-1:]:
        try:
            with Replay(journal) as replay:
                text = draw_book(Book(replay), width=100)
        except (LuodError, OSError) as error:
            text = f"{journal} cannot be drawn: {error}\n"
        (directory / "timeline.txt").write_text(text, encoding="utf-8")


def last_words(directory: Path) -> list[str]:
    """Return the last records of each journal and the last lines of the timeline, each under a heading."""
    lines: list[str] = []
    for journal in journals(directory / "state"):
        lines.append(f"--- last records of {journal.relative_to(directory)}")
        try:
            with Replay(journal) as replay:
                records = list(replay)[-RECORDS:]
        except (LuodError, OSError) as error:
            lines.append(str(error))
            continue
        for one in records:
            body = one.body.decode("utf-8", "replace")
            lines.append(f"{one.id} {one.stream} {one.type} {body[:BODY]}")
    timeline = directory / "timeline.txt"
    if timeline.exists():
        lines += ["--- last lines of timeline.txt", *timeline.read_text("utf-8").splitlines()[-LINES:]]
    return lines
