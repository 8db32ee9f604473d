# SPDX-License-Identifier: Apache-2.0
"""luoctl journal: show, replay, verify, export, timeline, why."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from ..journal.record import Record
from ..states.errors import LuodError
from ..views import record_json
from . import sentences
from .printing import clean, clock, colored, day, json_option, number, print_json, tinted, width, wrapped
from .program import Mistaken, json_everywhere, no
from .source import check_beginning, damage_json, locate, open_file, open_source

if TYPE_CHECKING:
    from ..journal.audit import Report

DAMAGED = 4

Command = Callable[..., Any]


def from_file(command: Command) -> Command:
    """Let a verb read a file instead of asking luod."""
    return click.option(
        "--journal", "path", type=click.Path(path_type=Path), metavar="PATH",
        help="A database, a copy of one (with its -wal beside it), or an export; otherwise luod is asked.",
    )(command)  # fmt: skip


def up_to(command: Command) -> Command:
    """Let a verb stop at a record."""
    return click.option(
        "--until", type=click.IntRange(1), metavar="ID", help="Read no further than this record."
    )(command)


class NotWritten(LuodError):
    """The output could not be written."""


class NoSuchUpdate(LuodError):
    """There is no update to draw."""

    code = "UNKNOWN_ID"


@click.group("journal")
@click.option(
    "--json", is_flag=True, expose_value=False, is_eager=True, callback=json_everywhere, help="Print JSON."
)
def journal() -> None:
    """Read the journal: the one of the running luod, or with --journal a file, whole or damaged.

    A file is copied before it is read and never changed, also while luod writes to it.
    """


@journal.command("show", short_help="Show records, one a line.")
@from_file
@click.option(
    "--stream", metavar="NAME", help="Only this stream: a session (vm1.1), an update (update/1) or luod."
)
@click.option(
    "--after", type=click.IntRange(0), default=0, metavar="ID", help="Only records behind this one."
)
@up_to
@click.option("--limit", type=click.IntRange(1), metavar="N", help="At most so many records.")
@json_option
@click.pass_obj
def show(
    socket: str,
    path: Path | None,
    stream: str | None,
    after: int,
    until: int | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Show records, one a line."""
    with open_source(socket, path) as source:
        records = source.records(after, stream)
        some = islice(_bounded(records, until), limit)
        if as_json:
            _show_json(some)
        else:
            _show_text(some)
        _read_on(records, path)
        if as_json:
            found = damage_json(source.report())
            sys.stdout.write("],")
            print_json_rest(found)
        _end(source.report(), told=as_json)


def _bounded(records: Iterator[Record], until: int | None) -> Iterator[Record]:
    return records if until is None else takewhile(lambda record: record.id <= until, records)


def _read_on(records: Iterator[Record], path: Path | None) -> None:
    """Read what is left of a file: whether it is whole must not depend on how much of it is shown."""
    if path is not None:
        for _ in records:
            continue


def _show_json(records: Iterator[Record]) -> None:
    import json

    sys.stdout.write('{"records":[')
    for index, record in enumerate(records):
        text = json.dumps(record_json(record), separators=(",", ":"))
        sys.stdout.write(("," if index else "") + "\n" + text)


def print_json_rest(rest: dict[str, Any]) -> None:
    """Close an object whose beginning has been written."""
    import json

    sys.stdout.write(json.dumps(rest, separators=(",", ":"))[1:] + "\n")


def _show_text(records: Iterator[Record]) -> None:
    boot = today = ""
    for record in records:
        if record.boot_id != boot or day(record.wall_ns) != today:
            boot, today = record.boot_id, day(record.wall_ns)
            click.echo(_dim(f"-- {today}, boot {clean(boot)}"))
        shown = record_json(record)
        lead = f"{record.id:>5}  {clock(record.wall_ns)}  {clean(record.stream):<10} "
        name, text = sentences.event(shown), sentences.of(shown)
        painted = (
            lead
            if name.startswith("effect.")
            else lead.replace(clean(record.stream), _bold(clean(record.stream)), 1)
        )
        click.echo(wrapped(text, first=painted, plain_first=lead, rest=" " * len(lead)))


def _dim(text: str) -> str:
    return click.style(text, dim=True) if colored() else text


def _bold(text: str) -> str:
    return click.style(text, bold=True) if colored() else text


@journal.command("replay", short_help="Rebuild what luod believed, at any record.")
@from_file
@up_to
@json_option
@click.pass_obj
def replay(socket: str, path: Path | None, until: int | None, as_json: bool) -> None:
    """Rebuild what luod believed, now or after record --until, by the code with which luod itself folds its journal.

    Sessions and updates are shown as by `luoctl sessions` and `luoctl status`, with what is in doubt and what does not fit.
    """
    from . import rebuild

    with open_source(socket, path) as source:
        records = source.records()
        state = rebuild.rebuild(_bounded(records, until))
        _read_on(records, path)
        report = source.report()
    found = {**state, **damage_json(report)}
    if as_json:
        print_json(found)
    else:
        rebuild.show(found)
    _end(report, told=as_json)


@journal.command("verify", short_help="Check every record and the file itself.")
@from_file
@json_option
@click.pass_obj
def verify(socket: str, path: Path | None, as_json: bool) -> None:
    """Check a journal: every chain value, every number, every event, and the file itself.

    Without --journal that of the running luod, in a copy; it must be readable by you. Exit code 4 when there is damage. An unfinished
    end, as a crash leaves it, is told and is no damage.
    """
    import msgspec

    from ..journal.export import looks_like
    from ..journal.verify import verify as check

    place = locate(socket, path)
    if not looks_like(place):
        check_beginning(place)
    report = check(place)
    if as_json:
        plain = msgspec.to_builtins(report)
        print_json({**plain, **damage_json(report)})
    else:
        _show_report(report)
    if not report.ok:
        no(DAMAGED)


def _show_report(report: Report) -> None:
    word = tinted("ok", "whole") if report.ok else tinted("failed", "DAMAGED")
    click.echo(
        f"{clean(report.source)}: {word}, {number(report.rows, 'record')} can be read, the last is {report.head}"
    )
    click.echo(f"  chain    {report.chain}")
    click.echo(f"  journal  {clean(report.journal) or 'unknown'}")
    for one in report.damage:
        click.echo(wrapped(str(one), first="  damage   ", rest=" " * 11))
    if report.torn is not None:
        click.echo(wrapped(_torn(report), first="  torn     ", rest=" " * 11))
    for name, count in report.unknown.items():
        text = f"{number(count, 'record')} of type {name}: not known to this version"
        click.echo(wrapped(text, first="  unknown  ", rest=" " * 11))


def _torn(report: Report) -> str:
    torn = report.torn
    assert torn is not None
    return f"{torn.file} ends unfinished at byte {torn.offset}: {torn.what}. This was never acknowledged"


@journal.command("export", short_help="Write it as text that proves itself.")
@from_file
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write this file, for you alone to read; otherwise standard output.",
)
@json_option
@click.pass_obj
def export(socket: str, path: Path | None, output: Path | None, as_json: bool) -> None:
    """Write a journal as text that proves itself: a manifest, a record a line, a trailer.

    Such a file can be given to every --journal. With --json, which needs --output, the trailer is printed as well.
    """
    if as_json and output is None:
        raise Mistaken(
            "--json needs --output: standard output is the export itself", hint="add --output FILE"
        )
    place = locate(socket, path)
    with open_file(place) as source:
        trailer = _export(source, output)
        report = source.report()
    if as_json:
        print_json({"path": str(output), **trailer, **damage_json(report)})
    elif output is not None:
        click.echo(f"{output}: {number(trailer['rows'], 'record')}, the last is {trailer['head']}")
    _end(report, told=as_json)


def _export(source: Any, output: Path | None) -> dict[str, Any]:
    import msgspec

    from .. import __version__
    from ..journal import export as text

    report = source.report()
    manifest = text.Manifest(1, report.journal, report.chain, f"luod {__version__}", report.sqlite)
    if output is None:
        sys.stdout.flush()
        return dict(msgspec.to_builtins(text.write(source.records(), sys.stdout.buffer, manifest)))
    try:
        with _beside(output) as (file, commit):
            trailer = text.write(source.records(), file, manifest)
            commit()
    except OSError as error:
        raise NotWritten(
            f"{output} cannot be written: {error.strerror}", hint="choose another --output"
        ) from None
    return dict(msgspec.to_builtins(trailer))


class _beside:
    """A file that takes its name only when it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> tuple[IO[bytes], Callable[[], None]]:
        descriptor, self._name = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
        self._file = os.fdopen(descriptor, "wb")
        return self._file, self._commit

    def _commit(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._name, self._path)

    def __exit__(self, *_: object) -> None:
        self._file.close()
        Path(self._name).unlink(missing_ok=True)


@journal.command("timeline", short_help="Draw what took how long in an update.")
@from_file
@click.option("--update", metavar="ID", help="This update; otherwise the newest.")
@json_option
@click.pass_obj
def timeline(socket: str, path: Path | None, update: str | None, as_json: bool) -> None:
    """Draw what took how long in an update: one bar for each session, and what the blackout was made of."""
    import msgspec

    from ..timeline import Story, draw

    with open_source(socket, path) as source:
        records = list(source.records())
        report = source.report()
    course = Story(records).course(update or "")
    if course is None and (report is None or report.ok):
        raise NoSuchUpdate(
            f"the journal knows no update {update!r}" if update else "the journal holds no update yet",
            hint="`luoctl journal replay` lists what it holds",
        )
    if as_json:
        print_json({"course": msgspec.to_builtins(course), **damage_json(report)})
    elif course is not None:
        text = draw(records, width=min(width(), 160), color=colored(), update=course.update)
        click.echo(text.rstrip("\n"))
    _end(report, told=as_json)


@journal.command("why", short_help="Tell what ended a session or an update.")
@click.argument("id")
@from_file
@json_option
@click.pass_obj
def why(socket: str, path: Path | None, id: str, as_json: bool) -> None:
    """Tell the story of a session or an update, and what ended it.

    ID is a session (vm1.1), a client (vm1: its newest session) or an update (update/1, or just 1).
    """
    from .why import explain, show

    with open_source(socket, path) as source:
        records = list(source.records())
        report = source.report()
    story = explain(records, id)
    if as_json:
        print_json({**story, **damage_json(report)})
    else:
        show(story)
    _end(report, told=as_json)


def _end(report: Report | None, *, told: bool) -> None:
    """Say what is wrong with the journal behind all that could be read, and end with the exit code for it."""
    if report is None:
        return
    if not told:
        sys.stdout.flush()
        for one in report.damage:
            click.echo(f"luoctl: {clean(report.source)} is damaged: {clean(one)}", err=True)
        if report.torn is not None:
            click.echo(f"note: {clean(_torn(report))}", err=True)
        if report.damage:
            click.echo(
                "hint: what is shown was read before and behind the damage; the file was not changed",
                err=True,
            )
    if report.damage:
        no(DAMAGED)
