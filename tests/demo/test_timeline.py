# SPDX-License-Identifier: Apache-2.0
"""The picture of an update: its numbers come from the records alone, and it fits and stays readable in every width."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count

import pytest

from luod.breakdown import Part, table
from luod.journal.record import Record
from luod.states import codec
from luod.states import events as ev
from luod.timeline import BAD, MAX_BARS, NOTHING, PHASES, Story, draw, of_book

MS = 1_000_000
OWNER = ev.Owner(0, 0, 1)
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


class Tape:
    """Writes records at chosen milliseconds. The boot clock begins again in each boot, the wall clock may be set."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._ids = count(1)
        self._boot, self._wall, self._began = "one", 0.0, 0.0

    def reboot(self, at_ms: float, *, wall_set_back_ms: float = 0.0) -> None:
        self._boot, self._began, self._wall = "two", at_ms, self._wall - wall_set_back_ms

    def say(self, at_ms: float, stream: str, event: ev.Event) -> None:
        kind, body = codec.encode(event)
        wall, boot = int((10_000 + at_ms + self._wall) * MS), int((500 + at_ms - self._began) * MS)
        self.records.append(
            Record(next(self._ids), stream, 0, kind, wall, boot, self._boot, "run", None, body, b"")
        )


def update(sessions: int, *, set_back_ms: float = 0.0, lost: int = 0) -> Tape:
    """An update of which every number is known: session n is claimed 10 n ms after the new kernel is there."""
    tape = Tape()
    names = [f"vm{number}.1" for number in range(sessions)]
    for name in names:
        tape.say(-50, name, ev.SessionBound(name[:-2], 1, OWNER))
    tape.say(0, "update/1", ev.UpdateStarted(1, 0, tuple(names)))
    for name in names:
        tape.say(10, name, ev.SessionCreated("update/1", f"luod.{name}"))
    for name in names:
        tape.say(20, name, ev.SessionPreserved())
    for name in names:
        tape.say(30, name, ev.SessionReady())
    tape.say(40, "update/1", ev.UpdateArmed(tuple(names)))
    for name in names:
        tape.say(50, name, ev.SessionRebooting("update/1"))
    tape.say(50, "update/1", ev.UpdateRebooting(tuple(names)))
    tape.reboot(150, wall_set_back_ms=set_back_ms)
    tape.say(150, "update/1", ev.UpdateRecovering("equal"))
    for number, name in enumerate(names):
        start = 150 + 10 * (number + 1)
        if number < lost:
            tape.say(start, name, ev.SessionLost("gone"))
            continue
        tape.say(start, name, ev.SessionRetrieved())
        tape.say(start + 5, name, ev.SessionRestored())
        tape.say(start + 6, name, ev.SessionFinished("marker"))
    tape.say(170 + 10 * sessions, "update/1", ev.UpdateDone(sessions - lost, lost, 0))
    return tape


def test_every_number_is_what_the_records_say() -> None:
    course = Story(update(2).records).course()
    assert course is not None
    assert (course.update, course.state, course.total_ms) == ("update/1", "done", 190)
    assert [(one.name, one.at_ms, one.ms) for one in course.phases] == [
        ("preparing", 0, 40), ("armed", 40, 10), ("kexec", 50, 100), ("recovering", 150, 40),
    ]  # fmt: skip
    second = course.sessions[1]
    assert [(one.name, one.at_ms, one.ms) for one in second.spans] == [
        ("preserving", 10, 20), ("frozen", 30, 20), ("kexec", 50, 100), ("unclaimed", 150, 20), ("retrieved", 170, 5),
        ("running", 175, 15),
    ]  # fmt: skip
    assert [one.blackout_ms for one in course.sessions] == [135, 145]
    assert (course.blackout_ms, course.worst_ms) == (145, 145)


def test_the_same_from_a_folded_book() -> None:
    story = Story(update(3).records)
    assert of_book(story.book) == story.course()


def test_a_wall_clock_that_was_set_back_bends_nothing() -> None:
    course = Story(update(2, set_back_ms=5000).records).course()
    assert course is not None
    assert all(span.ms >= 0 for line in course.sessions for span in line.spans)
    # How long the kernels were apart is what the wall clock would have said; nothing is known of it here.
    assert [one.blackout_ms for one in course.sessions] == [35, 45]


def test_time_that_a_client_was_thawed_is_no_blackout() -> None:
    tape = Tape()
    for at, event in (
        (0, ev.SessionBound("vm1", 1, OWNER)), (10, ev.SessionCreated("update/1", "luod.vm1.1")), (20, ev.SessionReady()),
        (30, ev.SessionThawed("luod was restarted")), (100, ev.SessionReady()), (140, ev.SessionThawed("undone")),
        (150, ev.SessionAborted("undone")),
    ):  # fmt: skip
        tape.say(at, "vm1.1", event)
    tape.say(5, "update/1", ev.UpdateStarted(1, 0))
    tape.say(
        160, "update/1", ev.UpdateAborted("somebody changed his mind\x1b[31m " + "and said so at length " * 9)
    )
    course = Story(tape.records).course()
    assert course is not None
    assert [span.name for span in course.sessions[0].spans] == [
        "preserving", "frozen", "preserving", "frozen", "preserving",
    ]  # fmt: skip
    assert course.sessions[0].blackout_ms == course.blackout_ms == 50
    picture = draw(tape.records)
    assert "somebody changed his mind?[31m and" in picture
    assert max(map(len, picture.splitlines())) <= 80
    assert "vm1.1 aborted" in picture


def test_the_newest_update_unless_another_is_named() -> None:
    tape = update(1)
    tape.say(500, "update/2", ev.UpdateStarted(2, 0))
    assert draw(tape.records).startswith("update/2: preparing, 0 sessions")
    assert draw(tape.records, update="update/1").startswith("update/1: done, 1 session,")
    assert draw(tape.records, update="update/3") == NOTHING == draw([])


def test_the_blackout_is_the_time_in_which_anybody_stood_still() -> None:
    tape = Tape()
    tape.say(0, "update/1", ev.UpdateStarted(1, 0))
    for name, ready, thawed in (("vm1.1", 10, 40), ("vm2.1", 20, 30), ("vm3.1", 90, 100)):
        tape.say(1, name, ev.SessionBound(name[:-2], 1, OWNER))
        tape.say(2, name, ev.SessionCreated("update/1", f"luod.{name}"))
        tape.say(ready, name, ev.SessionReady())
        tape.say(thawed, name, ev.SessionThawed("undone"))
    course = Story(tape.records).course()
    assert course is not None
    assert (course.blackout_ms, course.worst_ms) == (40, 30)


def lines(picture: str) -> Iterator[str]:
    yield from ESCAPE.sub("", picture).splitlines()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("sessions", [0, 1, 8, 64])
def test_it_fits(width: int, sessions: int) -> None:
    records = update(sessions).records
    plain, coloured = draw(records, width=width), draw(records, width=width, color=True)
    assert plain == "\n".join(line.rstrip() for line in lines(coloured)) + "\n"
    assert ("\x1b" in coloured, "\x1b" in plain) == (True, False)
    assert max(len(line) for line in plain.splitlines()) <= max(width, 80)
    order = [phase.mark for phase in PHASES]
    bars = [line for line in plain.splitlines() if re.match(r"vm\d+\.1 ", line)]
    assert len(bars) == min(sessions, MAX_BARS)
    for bar in bars:
        assert len(bar) <= width
        marks = [mark for mark in dict.fromkeys(bar.split(maxsplit=1)[1]) if mark in order]
        assert marks == sorted(marks, key=order.index), "phases come in their order"
        assert width < 120 or sessions > 8 or marks == order, "where there is room each of them is seen"
    if sessions > MAX_BARS:
        assert f"and {sessions - MAX_BARS} more" in plain
        assert {"vm0.1", "vm63.1"} <= {bar.split()[0] for bar in bars}, (
            "the quickest and the slowest are always shown"
        )
    assert draw(records, width=width, everything=True).count("━ ") >= sessions


def test_what_went_wrong_is_never_left_out() -> None:
    picture = draw(update(64, lost=3).records)
    for number in range(3):
        assert re.search(rf"^vm{number}\.1 .*x +lost$", picture, re.MULTILINE)
    assert "ended otherwise: vm0.1 lost, vm1.1 lost, vm2.1 lost" in picture
    assert "lost" in BAD


def test_long_names_are_cut() -> None:
    tape = update(1)
    long = [one for one in tape.records if one.stream == "vm0.1"]
    records = [
        Record(*[("a-very-long-name-of-a-guest-that-nobody-types.1" if one in long and name == "stream" else getattr(one, name))
                 for name in Record.__struct_fields__])
        for one in tape.records
    ]  # fmt: skip
    assert re.search(r"^a-very-long-name-of…", draw(records), re.MULTILINE)


def measured() -> Tape:
    """One session whose client measured its freeze and its restore: 1 + 2 + 4 ms before READY at 30, two steps of 2 ms after it."""
    tape = Tape()
    tape.say(0, "update/1", ev.UpdateStarted(1, 0, ("vm0.1", "vm1.1")))
    for name in ("vm0.1", "vm1.1"):
        tape.say(1, name, ev.SessionBound(name[:-2], 1, OWNER))
        tape.say(10, name, ev.SessionCreated("update/1", f"luod.{name}"))
        plan = tuple(ev.Step(step) for step in ("qemu.load", "iommufd.map_file#a", "iommufd.map_file#b"))
        tape.say(20, name, ev.SessionPreserved((ev.Resource("0x1", "memfd", plan=plan),)))
    tape.say(30, "vm0.1", ev.SessionReady((), {"pause": 1.0, "save": 2.0, "preserve": 4.0}))
    tape.say(30, "vm1.1", ev.SessionReady())
    for name in ("vm0.1", "vm1.1"):
        tape.say(50, name, ev.SessionRebooting("update/1"))
    tape.say(50, "update/1", ev.UpdateArmed(("vm0.1", "vm1.1")))
    tape.say(50, "update/1", ev.UpdateRebooting(("vm0.1", "vm1.1")))
    tape.reboot(580)
    tape.say(150, "update/1", ev.UpdateRecovering("equal"))
    for name in ("vm0.1", "vm1.1"):
        tape.say(160, name, ev.SessionRetrieved())
        took = 2.0 if name == "vm0.1" else 0.0
        for step in ("qemu.load", "iommufd.map_file#a", "iommufd.map_file#b"):
            tape.say(165, name, ev.SessionStep("0x1", step, ok=True, took_ms=took))
        tape.say(170, name, ev.SessionRestored())
        tape.say(171, name, ev.SessionFinished("marker"))
    tape.say(172, "update/1", ev.UpdateDone(2, 0, 0))
    return tape


def test_a_blackout_is_broken_into_its_parts() -> None:
    course = Story(measured().records).course()
    assert course is not None
    first, second = course.sessions
    parts = {part.name: part.ms for part in first.parts}
    # The boot clock of the second boot is 500 ms ahead of the tape, which began it at 580: its kernel began at 80.
    assert parts == {
        "pause": 1, "save": 2, "preserve": 4, "wait": 20, "kexec": 30, "boot": 70, "claim": 10,
        "load": 2, "map_file": 4, "rest": 4,
    }  # fmt: skip
    assert second.parts == (), "nothing was measured"
    assert first.blackout_ms == sum(parts.values()) == 147, "it stood still before it said so"
    assert second.blackout_ms == 140


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_parts_are_a_table(width: int) -> None:
    text = draw(measured().records, width=width)
    head, _, below = text.partition("\nblackout, ms")
    assert head != text
    assert all(len(line) <= width for line in below.splitlines())
    rows = {line.split()[0]: line.split()[1:] for line in below.splitlines()[1:]}
    assert rows["kexec"] == ["30.0"]
    assert rows["map_file"] == ["4.0"]
    assert "blackout, ms" not in draw(update(2).records, width=width)


def test_many_sessions_are_several_tables() -> None:
    columns = [(f"vm{n}.1", (Part("pause", float(n)), Part("boot", 1e4))) for n in range(20)]
    lines = table(columns, 60)
    assert all(len(line) <= 60 for line in lines)
    assert sum("blackout, ms" in line for line in lines) == 4
    assert [cell for line in lines if line.startswith("pause") for cell in line.split()[1:]] == [
        f"{n:.1f}" for n in range(20)
    ]
    assert table([], 60) == []
