# SPDX-License-Identifier: Apache-2.0
"""The descriptors of a guest by name, in this process and, where there is one, in a keeper.

An iommufd and a bound device end with the last copy of their fd. With a keeper they outlive their process, and a restarted one goes on
where it died; without, it begins anew. Both are right; a keeper spares the devices a reset.
"""

from __future__ import annotations

import os
from typing import Protocol


class Keeper(Protocol):
    """A second holder, such as `adapters.keeper.client.Keeper`."""

    def store(self, name: str, fd: int) -> None:
        """Hold a copy under a name, in place of what is held there."""
        ...

    def get(self, name: str) -> int | None:
        """Return a copy of what is held."""
        ...

    def remove(self, name: str) -> None:
        """Let go."""
        ...


class HeldFds:
    """Owns its copies. `prefix` (a session's id) keeps the names of guests apart in a keeper that they share."""

    def __init__(self, prefix: str = "", keeper: Keeper | None = None) -> None:
        self._prefix = prefix
        self._keeper = keeper
        self._fds: dict[str, int] = {}

    def keep(self, name: str, fd: int, *, lasting: bool = False) -> int:
        """Take over an fd under a name; with `lasting` the keeper has it before this returns. Returns the fd."""
        if lasting and self._keeper is not None:
            try:
                self._keeper.store(self._kept(name), fd)
            except BaseException:
                os.close(fd)
                raise
        if self._fds.get(name, fd) != fd:
            os.close(self._fds[name])
        self._fds[name] = fd
        return fd

    def find(self, name: str) -> int | None:
        """Return the fd of a name, still owned here, fetched from the keeper when only that has it."""
        if name not in self._fds and self._keeper is not None:
            fd = self._keeper.get(self._kept(name))
            if fd is not None:
                self._fds[name] = fd
        return self._fds.get(name)

    def own(self, name: str) -> int | None:
        """Return the fd of a name if this process has it, without asking the keeper."""
        return self._fds.get(name)

    def names(self) -> list[str]:
        """Return the names that this process has."""
        return list(self._fds)

    def forget(self, name: str) -> None:
        """Close an fd, here and in the keeper: what it stands for ends."""
        if self._keeper is not None:
            self._keeper.remove(self._kept(name))
        fd = self._fds.pop(name, None)
        if fd is not None:
            os.close(fd)

    def close(self) -> None:
        """Close the copies of this process; a keeper keeps its own."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _kept(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name
