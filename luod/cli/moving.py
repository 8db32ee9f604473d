# SPDX-License-Identifier: Apache-2.0
"""The verbs that move a host: load, kexec, abort, wait, resolve."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..client import Client
from ..conversation import ConnectionLost, Timeout, Unreachable
from ..states.errors import LuodError
from ..states.table import UPDATE
from .link import luod
from .looking import update_phrase
from .output import emit, json_option, paint, tell

Json = dict[str, Any]
LOAD_S = 300.0
RETURN_S = 15.0
"""How long a luod that went away in the middle of `wait` may take to come back, in seconds."""
FIXED_WORDS = ("BOOT_IMAGE=", "initrd=")
"""What the boot loader adds to a command line; it is not the next kernel's."""


class NotReached(LuodError):
    """The update did not come to a good end, or not in time; `code` says which."""

    def __init__(self, code: str, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code


# -- load ---------------------------------------------------------------------------------------------------------------------


@click.command("load")
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--initrd", type=click.Path(path_type=Path), help="Initial RAM disk of the next kernel.")
@click.option("--cmdline", help="Command line of the next kernel.")
@click.option("--reuse-cmdline", is_flag=True, help="Take this kernel's command line.")
@json_option
def load(image: Path, initrd: Path | None, cmdline: str | None, reuse_cmdline: bool, as_json: bool) -> None:
    """Load IMAGE as the next kernel (kexec_file_load). Luod opens the files and records their digests."""
    if (cmdline is None) == (not reuse_cmdline):
        raise click.UsageError("give either --cmdline or --reuse-cmdline")
    line = this_cmdline() if cmdline is None else cmdline
    for word in missing_words(line):
        tell(f"note: the command line has no {word}: without it the next kernel may take nothing over")
    with luod() as link:
        found: Json = link.load(
            image.absolute(), initrd=initrd.absolute() if initrd else None, cmdline=line, timeout=LOAD_S
        )["image"]
    if as_json:
        emit({"image": found})
    else:
        click.echo(f"loaded {found['kernel']}" + (f" with {found['initrd']}" if found["initrd"] else ""))
        click.echo(f"command line: {found['cmdline']}")


def this_cmdline(path: Path = Path("/proc/cmdline")) -> str:
    """Return the command line of the running kernel without what its boot loader added. Raises `LuodError`."""
    try:
        words = path.read_text(encoding="utf-8", errors="surrogateescape").split()
    except OSError as error:
        raise LuodError(f"{path} cannot be read: {error.strerror}", hint="give --cmdline instead") from None
    return " ".join(word for word in words if not word.startswith(FIXED_WORDS))


def missing_words(cmdline: str) -> list[str]:
    """Return what a command line lacks for the next kernel to take anything over."""
    words = cmdline.split()
    return [
        word
        for word in ("kho=on", "liveupdate=on")
        if not any(one.startswith(word.split("=")[0] + "=") for one in words)
    ]


# -- kexec and wait -------------------------------------------------------------------------------------------------------------


@click.command("kexec")
@click.option(
    "--wait/--no-wait",
    default=True,
    help="Follow the update until this kernel ends (default), or only ask for it.",
)
@click.option(
    "--deadline",
    type=click.FloatRange(min=0, min_open=True, max=86400),
    help="Seconds that the update may take up to the jump.",
)
@click.option("--force", is_flag=True, help="Lose what an earlier update has left unfinished.")
@json_option
def kexec(wait: bool, deadline: float | None, force: bool, as_json: bool) -> None:
    """Ask every client to preserve, wait for all of them, and jump into the loaded kernel.

    Leaving this command, by Ctrl-C too, does not stop the update: `luoctl abort` does.
    """
    with luod() as link:
        if not wait:
            update = str(link.kexec(force=force, deadline_s=deadline)["update"])
            finish(
                {"update": update, "state": "preparing"},
                as_json,
                f"{update} has begun: `luoctl wait` follows it",
            )
            return
        link.watch()
        update = str(link.kexec(force=force, deadline_s=deadline)["update"])
        course = Course(update, say=None if as_json else tell)
        try:
            course.follow(link, None)
        except ConnectionLost:
            if course.state != "rebooting":
                raise
    if course.state not in ("rebooting", "done"):
        raise NotReached(
            "ABORTED",
            f"{update} is {course.state}: {course.reason}",
            hint="the clients run on; put right what it names, then ask again",
        )
    finish({"update": update, "state": course.state}, as_json, f"{update}: this kernel has ended")


@click.command("wait")
@click.option("--timeout", type=click.FloatRange(min=0), help="Seconds to wait at most (default: for ever).")
@json_option
def wait(timeout: float | None, as_json: bool) -> None:
    """Wait until the running update has reached its end, in the old kernel or in the new one.

    0: every session of it finished. 1: it was undone, something was lost or failed, the time is over, or there was no update.
    """
    until = None if timeout is None else time.monotonic() + timeout
    say: Callable[[str], None] | None = None if as_json else tell
    found = _until_ended(until, say)
    short = {key: found[key] for key in ("id", "state", "counts", "reason", "dropped")}
    if found["state"] != "done" or any(found["counts"].get(bad, 0) for bad in ("lost", "failed", "expired")):
        if as_json:
            emit({"update": short})
            raise SystemExit(1)
        raise NotReached(
            "NOT_DONE",
            f"{click.unstyle(update_phrase(found))}",
            hint="`luoctl journal timeline` shows its course",
        )
    finish({"update": short}, as_json, update_phrase(found))


def _until_ended(until: float | None, say: Callable[[str], None] | None) -> Json:
    """Follow the newest update, over restarts of luod, until it has ended; return it as luod shows it."""
    first, back_by = True, 0.0
    while True:
        try:
            with luod() as link:
                first = False
                head = link.watch()["head"]
                del head
                update: Json | None = link.status()["update"]
                if update is None:
                    raise NotReached(
                        "NO_UPDATE", "there has been no update", hint="`luoctl kexec` begins one"
                    )
                course = Course(update["id"], state=update["state"], say=say)
                if not course.ended:
                    if say is not None:
                        say(f"{update['id']} is {paint(update['state'])}")
                    course.follow(link, until)
                return dict(link.status()["update"])
        except Timeout:
            raise NotReached(
                "TIMEOUT", "the update has not ended in time", hint="`luoctl status` shows what it waits for"
            ) from None
        except (ConnectionLost, Unreachable):
            # luod was restarted, or the kernel under it
            now = time.monotonic()
            if first or (back_by and now > back_by):
                raise
            back_by = back_by or now + RETURN_S
            if say is not None:
                say("luod has gone; waiting for it to come back")
            Client.connect(
                str(click.get_current_context().find_root().obj), retry_until=min(back_by, until or back_by)
            ).close()


class Course:
    """The course of one update, from the records that WATCH sends."""

    def __init__(self, update: str, *, state: str = "preparing", say: Callable[[str], None] | None) -> None:
        self.update = update
        self.state = state
        self.reason = ""
        self._say = say
        self._sessions: dict[str, str] = {}

    @property
    def ended(self) -> bool:
        """Whether the update has reached one of its ends."""
        return self.state in UPDATE.final

    def follow(self, link: Client, until: float | None) -> None:
        """Take records in until the update has ended. Raises `ConnectionLost`, and `Timeout` at `until` (monotonic seconds)."""
        while not self.ended:
            left = None if until is None else max(0.0, until - time.monotonic())
            with link.next_event(left, names=("PROGRESS",)) as event:
                self.take(event["record"])

    def take(self, record: Json) -> None:
        """Take one record in, and say what it means."""
        kind, body = str(record["type"]).rsplit(".", 1)[0], record["body"]
        if kind.startswith("update.") and record["stream"] == self.update:
            name = kind.removeprefix("update.")
            self.reason = str(body.get("reason") or body.get("cause") or body.get("message") or self.reason)
            state = {
                "started": "preparing",
                "disarmed": "preparing",
                "refused": "armed",
                "abort_requested": self.state,
            }.get(name, name)
            self.state = state
            if self._say is not None:
                self._say(f"{self.update}: {name.replace('_', ' ')}{self._detail(name, body)}")
        elif kind in SESSION_WORDS and self._say is not None:
            self._say(f"  {record['stream']}: {SESSION_WORDS[kind]}{self._detail(kind, body)}")

    @staticmethod
    def _detail(name: str, body: Json) -> str:
        if name == "armed":
            dropped = f", without {', '.join(body['dropped'])}" if body["dropped"] else ""
            return f" ({len(body['sessions'])} sessions{dropped})"
        if name == "done":
            return (
                f" ({', '.join(f'{value} {key}' for key, value in body.items() if value) or 'no sessions'})"
            )
        why = body.get("reason") or body.get("cause") or body.get("errno")
        return f" - {why}" if why else ""


SESSION_WORDS = {
    "session.created": "in the kernel",
    "session.preserved": "preserved",
    "session.ready": "ready",
    "session.retrieved": "retrieved",
    "session.restored": "restored",
    "session.finished": "finished",
    "session.nacked": "cannot follow",
    "session.aborted": "undone",
    "session.lost": "lost",
    "session.failed": "failed",
    "session.expired": "expired",
}
"""What is worth telling of a session while one waits."""


# -- abort and resolve ----------------------------------------------------------------------------------------------------------


@click.command("abort")
@click.argument("id", required=False)
@click.option("--reason", default="", help="Why; clients and the journal are told.")
@json_option
def abort(id: str | None, reason: str, as_json: bool) -> None:
    """Undo the running update, or only the session ID (vm1 or vm1.2), at any instant before the jump."""
    with luod() as link:
        found: list[str] = link.abort(id, reason=reason)["aborted"]
    finish({"aborted": found}, as_json, f"{', '.join(found)} is being undone: `luoctl wait` follows it")


@click.command("resolve")
@click.argument("key")
@click.argument("decision", type=click.Choice(["done", "absent", "retry", "give-up"]))
@json_option
def resolve(key: str, decision: Any, as_json: bool) -> None:
    """Say what became of the effect KEY that is in doubt.

    done: it happened. absent: it did not. retry: make it (again). give-up: count it as failed. `luoctl status` lists the keys.
    """
    with luod() as link:
        found = link.resolve(key, decision)
    finish({"key": found["key"], "status": found["status"]}, as_json, f"{found['key']} is {found['status']}")


def finish(value: Json, as_json: bool, words: str) -> None:
    """Print the answer of a verb that moved something."""
    if as_json:
        emit(value)
    else:
        click.echo(words)
