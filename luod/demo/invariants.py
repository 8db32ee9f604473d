# SPDX-License-Identifier: Apache-2.0
"""What must be true after a run, whatever was killed in it. Each check returns what is wrong, in words."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import msgspec

from ..engine.book import Book
from ..journal.verify import verify
from ..states.names import BLACK_BOX_SESSION, kernel_name
from ..views import session_json
from .outcome import Outcome, Setting, journal_of, leaked


def problems(outcome: Outcome, setting: Setting, directory: Path) -> list[str]:
    """Return everything that is wrong with a run; empty when it is as it must be."""
    return [
        *ending(outcome, setting),
        *memory(outcome, setting),
        *kernel_and_journal_agree(outcome),
        *nothing_left_in_the_kernel(outcome),
        *no_effect_twice(outcome),
        *no_fd_leaked(outcome),
        *recovery_is_idle(outcome),
        *journal_is_whole(outcome, directory),
    ]


def ending(outcome: Outcome, setting: Setting) -> Iterable[str]:
    """The update reached its end, or was cleanly undone."""
    if outcome.ending not in ("done", "aborted"):
        yield f"the update ended as {outcome.ending}"
    states = Counter(one["state"] for one in outcome.sessions)
    allowed = {"finished"} if outcome.ending == "done" else {"aborted", "new"}
    if set(states) - allowed:
        yield f"after {outcome.ending} the sessions are {dict(states)}"
    if outcome.ending == "done" and states["finished"] != setting.sessions:
        yield f"{states['finished']} of {setting.sessions} sessions finished"
    for one in outcome.sessions:
        if one["anomalies"]:
            yield f"{one['id']}: {one['anomalies'][0]}"


def memory(outcome: Outcome, setting: Setting) -> Iterable[str]:
    """Every byte of every client is what it was."""
    want = setting.sessions * setting.size
    if outcome.bytes_verified != want:
        yield f"{outcome.bytes_verified} of {want} bytes are right"


def kernel_and_journal_agree(outcome: Outcome) -> Iterable[str]:
    """No session is called lost that the kernel held; none is called finished that it did not hold."""
    carried = {entry["session"] for entry in outcome.audit if entry["op"] == "RETRIEVE_SESSION"}
    ended = {entry["session"] for entry in outcome.audit if entry["op"] == "FINISH"}
    for one in outcome.sessions:
        name = kernel_name(one["id"])
        if one["state"] == "lost" and name in carried:
            yield f"{one['id']} is called lost, but the kernel held it"
        if one["state"] == "finished" and name not in carried:
            yield f"{one['id']} is called finished, but nobody retrieved it"
        if one["state"] == "finished" and name not in ended:
            yield f"{one['id']} is called finished, but FINISH never ran"


def nothing_left_in_the_kernel(outcome: Outcome) -> Iterable[str]:
    """The kernel holds nothing in the end but, before a kexec, the black box."""
    if (
        len(set(outcome.boots)) != (2 if outcome.ending == "done" else 1)
        or outcome.held["boot_id"] != outcome.boots[-1]
    ):
        yield f"the kernels that ran were {outcome.boots}, the last is {outcome.held['boot_id']}"
    box = {BLACK_BOX_SESSION} if outcome.ending == "aborted" else set[str]()
    for one in (*outcome.held["incoming"], *outcome.held["outgoing"]):
        if one["name"] not in box:
            yield f"the kernel still holds {one['name']}, {one['state']}"


def no_effect_twice(outcome: Outcome) -> Iterable[str]:
    """The kernel's own list of calls has no effect twice."""
    open_: set[str] = set()
    seen: Counter[tuple[object, ...]] = Counter()
    for entry in outcome.audit:
        op, name, boot = entry["op"], entry["session"], entry["boot"]
        if op == "CREATE_SESSION":
            if name in open_:
                yield f"CREATE_SESSION {name} twice in boot {boot}"
            open_.add(name)
        elif op == "CLOSE":
            open_.discard(name)
            for key in [key for key in seen if key[0] == "PRESERVE_FD" and key[2] == name]:
                del seen[key]
        elif op in ("PRESERVE_FD", "RETRIEVE_SESSION", "FINISH", "KEXEC_LOAD", "REBOOT_KEXEC"):
            key = (op, boot, name, entry["token"])
            seen[key] += 1
            if seen[key] > 1:
                yield f"{op} {name or ''} {entry['token'] or ''} twice in boot {boot}"
        if op == "REBOOT_KEXEC":
            open_.clear()
    jumps = sum(entry["op"] == "REBOOT_KEXEC" for entry in outcome.audit)
    if jumps != (outcome.ending == "done"):
        yield f"{jumps} kexecs in an update that is {outcome.ending}"


def no_fd_leaked(outcome: Outcome) -> Iterable[str]:
    """Both luod and the keeper end with what they began with, but for the black box, which lives as long as its boot."""
    for name, extra in leaked(outcome).items():
        yield f"{name} leaked {dict(extra)}"


def recovery_is_idle(outcome: Outcome) -> Iterable[str]:
    """Another recovery writes nothing but that luod was started."""
    if outcome.late_records != ["daemon.started.v1"]:
        yield f"one more recovery wrote {outcome.late_records}"


def journal_is_whole(outcome: Outcome, directory: Path) -> Iterable[str]:
    """The journal verifies, and a copy of it replays to what the daemon said."""
    report = verify(journal_of(directory))
    if not report.ok:
        yield f"the journal does not verify: {msgspec.json.encode(report).decode()}"
    from ..journal.replay import Replay

    with tempfile.TemporaryDirectory(prefix="luod-copy-", dir=directory) as copy:
        for one in journal_of(directory).parent.glob("journal.db*"):
            if not one.name.endswith(".lock"):
                shutil.copy(one, copy)
        with Replay(Path(copy) / "journal.db") as replay:
            book = Book(replay)
    replayed = msgspec.json.decode(msgspec.json.encode([session_json(one) for one in book.sessions()]))
    if replayed != outcome.sessions:
        different = [a["id"] for a, b in zip(replayed, outcome.sessions, strict=False) if a != b]
        yield f"the journal replays to something else than the daemon said: {different or 'another number of sessions'}"
