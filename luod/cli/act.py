# SPDX-License-Identifier: Apache-2.0
"""The verbs that act: load, kexec, wait, abort, resolve."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from ..client import Client
from ..conversation import Timeout
from ..states.errors import LuodError
from ..views import every
from . import reach
from .follow import ENDS, Follower, NotEnded, Progress, good, newest, verdict
from .printing import clean, json_option, print_json
from .program import Mistaken, no

PROC_CMDLINE = Path("/proc/cmdline")
LOAD_S = 300.0
JUMP_S = 15.0
"""How long luod is awaited after it went away in a kexec: on a real machine luoctl does not live that long."""


class NoUpdate(LuodError):
    """There is no update to speak of."""

    code = "NO_UPDATE"


@click.command("load")
@click.argument("image", type=click.Path(path_type=Path))
@click.option(
    "--initrd", type=click.Path(path_type=Path), metavar="FILE", help="Initial RAM disk of the next kernel."
)
@click.option("--cmdline", metavar="TEXT", help="Command line of the next kernel.")
@click.option("--reuse-cmdline", is_flag=True, help="Take the command line of the running kernel.")
@json_option
@click.pass_obj
def load(
    socket: str, image: Path, initrd: Path | None, cmdline: str | None, reuse_cmdline: bool, as_json: bool
) -> None:
    """Load the next kernel from IMAGE. luod opens the files, so it must be able to read them."""
    if (cmdline is not None) == reuse_cmdline:
        raise Mistaken(
            "one of --cmdline and --reuse-cmdline is needed"
            if cmdline is None
            else "--cmdline and --reuse-cmdline exclude each other",
            hint="--reuse-cmdline takes that of the running kernel",
        )
    text = running_cmdline() if cmdline is None else cmdline
    fields = {
        "kernel": str(image.absolute()),
        "cmdline": text,
        "initrd": str(initrd.absolute()) if initrd else None,
    }
    reply = reach.ask(socket, "LOAD", timeout=LOAD_S, **fields)
    if as_json:
        print_json(reply)
        return
    loaded = reply["image"]
    click.echo(
        f"loaded {clean(loaded['kernel'])}" + (f" with {clean(loaded['initrd'])}" if loaded["initrd"] else "")
    )
    click.echo(f"  cmdline  {clean(loaded['cmdline'])}")
    click.echo(f"  digest   {loaded['kernel_digest']}")
    missing = [flag for flag in ("kho", "liveupdate") if not enabled(loaded["cmdline"], flag)]
    if missing:
        wanted = " ".join(f"{flag}=on" for flag in missing)
        click.echo(f"hint: that kernel may not take anything over: its command line lacks {wanted}", err=True)


def running_cmdline(path: Path = PROC_CMDLINE) -> str:
    """Return the command line of the running kernel, without what its boot loader added for itself. Raises `Mistaken`."""
    try:
        words = path.read_text(encoding="utf-8", errors="replace").split()
    except OSError as error:
        raise Mistaken(f"{path} cannot be read: {error.strerror}", hint="give --cmdline instead") from None
    return " ".join(word for word in words if not word.startswith(("BOOT_IMAGE=", "initrd=")))


def enabled(cmdline: str, flag: str) -> bool:
    """Say whether a kernel command line switches something on."""
    from ..adapters.liveupdate.diagnosis import cmdline_flag

    return bool(cmdline_flag(cmdline, flag))


@click.command("kexec")
@click.option("--no-wait", is_flag=True, help="Return when the update has begun.")
@click.option(
    "--deadline",
    type=click.FloatRange(0, 86400),
    metavar="SECONDS",
    help="Abort if the kexec has not come by then.",
)
@click.option("--force", is_flag=True, help="Lose the sessions of earlier updates that are not finished.")
@json_option
@click.pass_obj
def kexec(socket: str, no_wait: bool, deadline: float | None, force: bool, as_json: bool) -> None:
    """Begin an update: ask all clients to preserve, wait for them, jump into the loaded kernel.

    Goes on with an update that waits for a person. Exit code 1 when the update is undone; the machine then runs on as before.
    """
    with reach.connect(socket) as client:
        head = int(client.call("STATUS").fields["journal"]["rows"])
        name = str(client.call("KEXEC", force=force, deadline_s=deadline).fields["update"])
        update = newest(client) if no_wait else None
    if no_wait:
        _tell(update, as_json, text=f"{name} has begun; `luoctl wait` follows it")
        return
    progress = Progress(quiet=as_json)
    follower = Follower(socket, progress, patience_s=JUMP_S, after=head)
    try:
        update = follower.run(lambda one: one["state"] in ENDS or one["state"] == "recovering")
    finally:
        progress.close()
    assert update is not None
    fine = update["state"] == "recovering" or good(update)
    text = verdict(update)
    if update["state"] == "recovering":
        text = f"{name}: the new kernel runs; `luoctl wait` follows the sessions"
    _tell(update, as_json, text=text, ok=fine)


@click.command("wait")
@click.option(
    "--timeout", type=click.FloatRange(0), metavar="SECONDS", help="Give up after so long; otherwise never."
)
@json_option
@click.pass_obj
def wait(socket: str, timeout: float | None, as_json: bool) -> None:
    """Wait until the newest update has ended, through restarts of luod.

    Exit code 0 when it is done and no session of it is lost or failed, else 1; also 1 when the time is over first.
    """
    progress = Progress(quiet=as_json)
    try:
        update = Follower(socket, progress, timeout_s=timeout).run(lambda one: one["state"] in ENDS)
    finally:
        progress.close()
    if update is None:
        raise NoUpdate("there was no update yet", hint="`luoctl kexec` begins one")
    _tell(update, as_json, text=verdict(update), ok=good(update))


def _tell(update: dict[str, Any] | None, as_json: bool, *, text: str, ok: bool = True) -> None:
    if as_json:
        print_json({"ok": ok, "update": update})
    else:
        click.echo(clean(text))
    if not ok:
        no()


@click.command("abort")
@click.argument("id", required=False)
@click.option("--reason", default="", metavar="TEXT", help="What the journal and the clients are told.")
@click.option(
    "--timeout",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for its end.",
)
@json_option
@click.pass_obj
def abort(socket: str, id: str | None, reason: str, timeout: float, as_json: bool) -> None:
    """Undo the running update, or only the session ID, and wait until that is done.

    Exit code 1 when it can no longer be undone, or is not yet when the time is over.
    """
    progress = Progress(quiet=as_json)
    deadline = time.monotonic() + timeout
    undone = False
    with reach.connect(socket) as client:
        client.call("WATCH")
        aborted = [str(name) for name in client.call("ABORT", id=id, reason=reason).fields["aborted"]]
        left = set(aborted) - _ended(client, aborted)
        try:
            while left:
                with client.next_event(max(0.0, deadline - time.monotonic()), names=["PROGRESS"]) as event:
                    record = event["record"]
                progress.record(record)
                if str(record["type"]).partition(".")[2].startswith("aborted."):
                    left.discard(str(record["stream"]))
            undone = True
        except Timeout:
            pass
        finally:
            progress.close()
    if as_json:
        print_json({"aborted": aborted, "ok": undone})
    elif undone:
        click.echo(f"{', '.join(aborted)}: undone")
    else:
        raise NotEnded(
            f"{', '.join(sorted(left))} is still being undone",
            hint="`luoctl wait` or `luoctl status` tells more",
        )
    if not undone:
        no()


def _ended(client: Client, streams: list[str]) -> set[str]:
    """Return those of the streams that have ended: what ends between the question and the answer is not missed."""
    ended = {one["id"] for one in every(client.call, "SESSIONS", "sessions") if one["state"] == "aborted"}
    update = newest(client)
    if update is not None and update["state"] in ENDS:
        ended.add(update["id"])
    return ended & set(streams)


@click.command("resolve")
@click.argument("key")
@click.argument("decision", type=click.Choice(["done", "absent", "retry", "give-up"]))
@json_option
@click.pass_obj
def resolve(socket: str, key: str, decision: str, as_json: bool) -> None:
    """Settle by your word the effect KEY, which is in doubt (`luoctl status` lists such effects), or a session that has failed.

    Of an effect: done (it has happened), absent (it has not), retry (make it again), give-up (count it as failed). KEY may also be
    a session's id: retry lets its client try again, give-up frees what it holds.
    """
    reply = reach.ask(socket, "RESOLVE", key=key, decision=decision)
    if as_json:
        print_json(reply)
    else:
        click.echo(f"{clean(reply['key'])} is settled: {reply['status']}")
