# SPDX-License-Identifier: Apache-2.0
"""The fds that are held, by name; closing them is what this whole process must not do by accident."""

from __future__ import annotations

import os
import select
from typing import NamedTuple

from ...states.errors import LuodError


class Entry(NamedTuple):
    """One held fd. `serial` grows with every fd stored; `watched` says that it goes when its other end does."""

    serial: int
    name: str
    fd: int
    watched: bool


class StoreFull(LuodError):
    """No room for another fd."""


class FdStore:
    """Owns fds. `limit` is how many at most, as FileDescriptorStoreMax= is for systemd; `poll` watches those that are to be watched."""

    def __init__(self, limit: int, poll: select.epoll) -> None:
        self.limit = limit
        self._poll = poll
        self._named: dict[str, list[Entry]] = {}
        self._entries: dict[int, Entry] = {}  # by serial, in the order of their arrival
        self._watched: dict[int, Entry] = {}  # by fd
        self._last = 0

    def __len__(self) -> int:
        return len(self._entries)

    def require_room(self, name: str, promised: int = 0) -> None:
        """Raise `StoreFull` when no fd fits besides those held and the `promised` ones that are being made."""
        if len(self._entries) + promised >= self.limit:
            raise StoreFull(
                f"{name} cannot be stored: {len(self._entries) + promised} fds are held, the limit is {self.limit}",
                hint="raise --max of luod-keeper and its LimitNOFILE=, or let sessions end",
            )

    def keep(self, name: str, fd: int, *, watched: bool = False) -> None:
        """Hold an fd, which the store owns from now on, as the newest of its name."""
        if watched:
            try:
                self._poll.register(fd, 0)  # hang-up and error are always reported
            except PermissionError:
                watched = False  # a file that cannot be polled never hangs up
        self._last += 1
        entry = Entry(self._last, name, fd, watched)
        self._named.setdefault(name, []).append(entry)
        self._entries[entry.serial] = entry
        if watched:
            self._watched[fd] = entry

    def newest(self, name: str) -> int | None:
        """Return the newest fd of a name, still the store's, or None."""
        entries = self._named.get(name)
        return entries[-1].fd if entries else None

    def remove(self, name: str) -> bool:
        """Close all fds of a name; say whether there were any."""
        entries = self._named.pop(name, [])
        for entry in entries:
            self._let_go(entry)
        return bool(entries)

    def page(self, after: int, budget: int) -> tuple[list[str], int, bool]:
        """Return the names of the oldest entries stored after a serial, as many as fit in `budget` bytes of JSON.

        With them the serial of the last one, and whether there are more.
        """
        names: list[str] = []
        for serial, entry in self._entries.items():
            if serial <= after:
                continue
            budget -= len(entry.name) * 2 + 3  # as if each character had to be escaped
            if budget < 0:
                return names, after, True
            names.append(entry.name)
            after = serial
        return names, after, False

    def watches(self, fd: int) -> bool:
        """Say whether an fd is watched for its other end."""
        return fd in self._watched

    def hung_up(self, fd: int) -> str | None:
        """Close a watched fd whose other end is really gone; return its name if it was.

        The event may be older than the fd: numbers are used again. So the fd is asked once more.
        """
        poll = select.poll()
        poll.register(fd, 0)
        if not poll.poll(0):
            return None
        entry = self._watched[fd]
        entries = self._named[entry.name]
        entries.remove(entry)
        if not entries:
            del self._named[entry.name]
        self._let_go(entry)
        return entry.name

    def _let_go(self, entry: Entry) -> None:
        if entry.watched:
            del self._watched[entry.fd]
            self._poll.unregister(entry.fd)
        del self._entries[entry.serial]
        os.close(entry.fd)

    def close(self) -> None:
        """Close everything."""
        for name in list(self._named):
            self.remove(name)
