# SPDX-License-Identifier: Apache-2.0
"""The processes of an emulated world: who belongs to it, and how all of them end."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

_KILL_DEADLINE_MS = 30_000


def children_of(proc: Path = Path("/proc")) -> dict[int, list[int]]:
    """Map each pid to its children, as /proc shows them now."""
    found: dict[int, list[int]] = {}
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            text = (entry / "stat").read_text("utf-8", "replace")
        except OSError:
            continue
        # The command name is in parentheses and may hold anything, so count from the last one.
        parent = int(text[text.rindex(")") + 2 :].split()[1])
        found.setdefault(parent, []).append(int(entry.name))
    return found


class Population:
    """Members by pid, each with a pidfd opened while it was known to be alive, so that no later process is taken for it."""

    def __init__(self) -> None:
        self._members: dict[int, int] = {}
        self.spared: set[int] = {os.getpid()}

    def __contains__(self, pid: int) -> bool:
        return pid in self._members

    def pids(self) -> list[int]:
        """The members, in the order they were seen."""
        return list(self._members)

    def add(self, pid: int) -> int | None:
        """Take a process in; returns its new pidfd, or None if it is in already, is spared, or has ended."""
        if pid <= 0 or pid in self._members or pid in self.spared:
            return None
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return None
        self._members[pid] = pidfd
        return pidfd

    def forget(self, pid: int) -> None:
        """Drop a member: it has ended, or was not the process it was taken for."""
        pidfd = self._members.pop(pid, None)
        if pidfd is not None:
            os.close(pidfd)

    def spare(self, pid: int) -> None:
        """Never kill this process."""
        self.spared.add(pid)
        self.forget(pid)

    def kill(self) -> list[int]:
        """End every member and its descendants with SIGKILL, wait for their end, and forget them; returns their pids.

        All are stopped first: a stopped process cannot fork, so the tree is complete when no new member turns up any more.
        """
        while True:
            for pidfd in self._members.values():
                _signal(pidfd, signal.SIGSTOP)
            if not self._add_descendants():
                break
        for pidfd in self._members.values():
            _signal(pidfd, signal.SIGKILL)
        for pid, pidfd in self._members.items():
            poller = select.poll()
            poller.register(pidfd, select.POLLIN)
            if not poller.poll(_KILL_DEADLINE_MS):
                raise TimeoutError(f"process {pid} of the emulated world does not end")
        ended = list(self._members)
        for pid in ended:
            self.forget(pid)
        return ended

    def _add_descendants(self) -> bool:
        tree = children_of()
        todo = list(self._members)
        fresh = False
        while todo:
            for child in tree.get(todo.pop(), ()):
                if child in self.spared or child in self._members:
                    continue
                if self.add(child) is not None:
                    fresh = True
                    todo.append(child)
        return fresh


def _signal(pidfd: int, number: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return
