# SPDX-License-Identifier: Apache-2.0
"""One run of the demo: plays the operator of the host, and looks at everything afterwards.

Boot, clients subscribe, load, kexec, boot again, clients claim, verify and finish. Whenever luod dies it is started again at once, and
the operator asks again for what was asked for. All waiting is on pipes, pidfds and WATCH.
"""

from __future__ import annotations

import errno
import json
import select
import signal
import time
from itertools import pairwise
from typing import Any

from ..client import Client, ClientError, ConnectionLost
from ..states.errors import LuodError
from ..states.table import SESSION
from ..views import every
from . import host
from .host import Host
from .outcome import Outcome, leaked
from .process import Child

CMDLINE = "console=ttyS0 kho=on liveupdate=on"
LEAK_S = 30.0


class Run(Host):
    """A host with its operator."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._said_abort = False

    def run(self) -> Outcome:
        """Go through the whole update; return what it has shown. Raises `DemoFailed`."""
        self.start_emulator()
        self.say("the first kernel boots")
        self.start_boot()
        with self.link() as link:
            self._settle_fds(link, self.outcome.fds_before)
        if self.setting.refuse:
            self.control.inject("freeze", errno=errno.EBUSY)
        self.start_clients()
        for child in self.clients():
            if b"subscribed" not in child.line(host.PATIENCE_S):
                raise self.failed(f"{child.name} did not subscribe")
        self.say(f"{self.setting.sessions} clients filled their memory and subscribed")
        if self._first_boot() == "aborted":
            self._after_abort()
            return self._look()
        self.say("the second kernel boots")
        self._bury("luod", "keeper", *(child.name for child in self.clients()))
        self.start_boot()
        with self.link() as link:
            self._settle_fds(link, self.outcome.fds_before)
        self.start_clients()
        self._second_boot()
        return self._look()

    def _bury(self, *names: str) -> None:
        for name in names:
            child = self._children[name]
            if not child.ended(host.PATIENCE_S):
                raise self.failed(f"{name} outlived its kernel")
            child.stop()
            if name.startswith("client/"):
                del self._children[name]

    def _first_boot(self) -> str:
        """Ask for the update until the kernel has changed or the update is undone."""
        aborting = False
        while True:
            try:
                with self.link() as link:
                    ended = self._ask(link, aborting)
            except (ConnectionLost, LuodError) as error:
                if (
                    not isinstance(error, ConnectionLost)
                    and self._children["luod"].code is None
                    and not self._dying()
                ):
                    raise
                ended = ""
            if ended:
                return ended
            ended = self._wait_change()
            if ended:
                return ended
            aborting = self.setting.operator == "abort"

    def _dying(self) -> bool:
        return self._children["luod"].ended(5.0)

    def _ask(self, link: Client, aborting: bool) -> str:
        """Do what the operator has to do now, then follow the update; return its ending, or nothing when luod died."""
        status = link.call("STATUS").fields
        update = status["update"]
        if update is None:
            if not status["image_loaded"]:
                link.call("LOAD", kernel=str(self.image), cmdline=CMDLINE)
            link.call("KEXEC")
        elif update["state"] in ("aborted", "lost", "done"):
            return str(update["state"])
        elif update["paused"] and not self._said_abort and not self._decide(link, aborting):
            return self._ask(link, aborting)
        link.call("WATCH", after=0)
        while True:
            event = link.next_event(host.PATIENCE_S)
            if event.name == "PROGRESS" and event.fields["record"]["type"].startswith("update.aborted."):
                return "aborted"

    def _decide(self, link: Client, aborting: bool) -> bool:
        """Be the person for whom an update waits; return False if it had gone on meanwhile."""
        try:
            if aborting:
                link.call("ABORT", reason="the operator has changed his mind")
                self._said_abort = True
            else:
                link.call("KEXEC")
        except ClientError as error:
            if error.code in ("NO_UPDATE", "TOO_LATE", "UPDATE_RUNNING"):
                return False
            raise
        return True

    def _wait_change(self) -> str:
        """Wait until luod has died or the boot has changed; restart luod if it killed itself."""
        luod, init = self._children["luod"], self._children["init"]
        poll = select.poll()
        for child in (luod, init):
            poll.register(child.pidfd, select.POLLIN)
        if not poll.poll(host.PATIENCE_S * 1000):
            raise self.failed("nothing happened")
        if luod.ended() and self._revived():
            return ""
        # The emulator answers nobody between the end of a world and the next boot, so this cannot come too early.
        if init.ended() or self.control.boot_id() != self.boot_id:
            return "kexec"
        raise self.failed(f"luod ended with {luod.code}")

    def _second_boot(self) -> None:
        """Wait until all clients have finished and the update is done."""
        waiting = {child.pidfd: child for child in self.clients()}
        while waiting:
            luod = self._children["luod"]
            poll = select.poll()
            for pidfd in (*waiting, luod.pidfd):
                poll.register(pidfd, select.POLLIN)
            ready = poll.poll(host.PATIENCE_S * 1000)
            if not ready:
                raise self.failed("clients did not finish")
            for pidfd, _ in ready:
                if pidfd == luod.pidfd:
                    self._revive()
                else:
                    self._take(waiting.pop(pidfd), "finished")
        while True:
            try:
                with self.link() as link:
                    if link.call("STATUS").fields["update"]["state"] != "recovering":
                        break
                    link.call("WATCH", after=0)
                    while (
                        not link.next_event(host.PATIENCE_S)
                        .fields["record"]["type"]
                        .startswith("update.done.")
                    ):
                        pass
            except LuodError:
                if not self._dying():
                    raise
                self._revive()

    def _revive(self) -> None:
        if not self._revived():
            raise self.failed(f"luod ended with {self._children['luod'].code}")

    def _take(self, child: Child, at: str) -> None:
        child.ended(None)
        reports = [json.loads(line) for line in child.lines_now()]
        final = [report for report in reports if report["at"] == at]
        if child.code != 0 or not final:
            raise self.failed(f"{child.name} ended with {child.code}")
        self.outcome.bytes_verified += final[-1]["bytes"]

    def _after_abort(self) -> None:
        """After an abort every client still has its memory, whole."""
        for child in self.clients():
            if not child.ended(host.PATIENCE_S):
                raise self.failed(f"{child.name} did not hear of the abort")
            self._take(child, "aborted")

    # -- looking

    def _settle_fds(self, link: Client, book: dict[str, list[str]]) -> None:
        """Note what luod and the keeper have open, with one operator connected and no client."""
        deadline = time.monotonic() + host.PATIENCE_S
        while link.call("STATUS").fields["clients"] and time.monotonic() < deadline:
            continue
        for name in ("luod", "keeper"):
            book[name] = self._children[name].fds()

    def _settle_fds_after(self, link: Client) -> None:
        """Note what is open in the end. A connection that is just being closed is no leak: a leak is still there after `LEAK_S`."""
        patience = time.monotonic() + LEAK_S
        while True:
            self._settle_fds(link, self.outcome.fds_after)
            if not leaked(self.outcome) or time.monotonic() > patience:
                return

    def _note_points(self) -> None:
        reached = [f"{life.boot}:{point}" for life in self.lives for point in life.reached()]
        self.outcome.points = list(dict.fromkeys(reached))
        for before, life in pairwise(self.lives):
            if before.killed() and before.boot == life.boot:
                self.outcome.recovery_points = list(dict.fromkeys(life.reached()))
                return

    def _look(self) -> Outcome:
        """Gather what the checks need, and see that one more recovery changes nothing."""
        with self.link() as link:
            self._settle_fds_after(link)
            self.outcome.sessions = _settled_sessions(link)
            status = link.call("STATUS").fields
            self.outcome.update = status["update"]
            rows = status["journal"]["rows"]
        self._note_points()
        self._children["luod"].stop()
        self.start_luod()
        with self.link() as link:
            late = link.call("JOURNAL", after=rows).fields["records"]
        self.outcome.late_records = [record["type"] for record in late]
        self.outcome.audit = self.control.audit()
        self.outcome.held = self.control.state()
        self.outcome.ending = str(self.outcome.update["state"]) if self.outcome.update else "none"
        self._children["luod"].stop(signal.SIGTERM)
        return self.outcome


def _settled_sessions(link: Client) -> list[dict[str, Any]]:
    """Return all sessions once each has ended; what a client leaves behind is cleared away a moment after it."""
    link.call("WATCH")
    while True:
        sessions = every(link.call, "SESSIONS", "sessions")
        if all(one["state"] in SESSION.final for one in sessions):
            return sessions
        link.next_event(host.PATIENCE_S).close()
