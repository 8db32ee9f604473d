# SPDX-License-Identifier: Apache-2.0
"""What a file handler is: the kernel's callback set (include/linux/liveupdate.h, struct liveupdate_file_ops), as a class.

A kind of file that the emulated kernel can carry is a `FileHandler`; the registry makes them for each boot, because the compatible
string belongs to the kernel that is booting.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from .board import Board

Payload = Any
"""What a handler keeps of a file: in the old world from preserve to the jump, then what crosses it, then until finish."""

RetrieveStatus = Literal["untouched", "retrieved", "failed"]


class Refused(Exception):
    """The emulated kernel answers with an errno."""

    def __init__(self, code: int) -> None:
        super().__init__(errno.errorcode.get(code, str(code)), os.strerror(code))
        self.code = code


class File(Protocol):
    """An open file description as the model sees it: something a handler recognises, and that can be let go of."""

    def fileno(self) -> int:
        """Return the fd the emulated kernel holds it by."""
        ...

    def close(self) -> None:
        """Drop the reference."""
        ...


class SessionView(Protocol):
    """The session a handler is called for: handlers look each other's files up in it."""

    @property
    def name(self) -> bytes:
        """Return the session's name."""
        ...

    def preserved(self) -> Iterable[tuple[int, str, File, Payload]]:
        """Yield token, compatible string, file and data of what is preserved in this session so far, in order."""
        ...


class FileHandler:
    """The callbacks of one kind of file. Those that answer with an errno raise `Refused`."""

    kind: str = ""
    """The name of the kind, stable over kernels; a kernel image says which compatible string it has for it."""

    can_unfreeze = True
    """False stands for a handler without an unfreeze callback: a file that was frozen stays so after a roll-back."""

    def __init__(self, compatible: str) -> None:
        self.compatible = compatible

    def can_preserve(self, file: File) -> bool:
        """Whether this handler takes the file; it must have no effect."""
        raise NotImplementedError

    def get_id(self, file: File) -> Hashable:
        """Return what makes two fds the same object; by default the open file description itself."""
        return id(file)

    def preserve(self, file: File, session: SessionView, /) -> Payload:
        """Make the file ready to be carried, while it goes on being used."""
        raise NotImplementedError

    def unpreserve(self, file: File, data: Payload) -> None:
        """Undo preserve; it cannot fail."""

    def freeze(self, file: File, data: Payload, session: SessionView) -> None:
        """Take the last state, inside reboot(2)."""

    def unfreeze(self, file: File, data: Payload, /) -> None:
        """Undo freeze, when a later file would not freeze."""

    def carry(self, file: File, data: Payload) -> Payload:
        """Return what the next kernel finds; called at the jump, when no process is alive any more."""
        raise NotImplementedError

    def boot(self, _payload: Payload, /) -> None:
        """Take note of a carried payload at early boot, before anybody opens the device."""

    def discard(self, payload: Payload) -> None:
        """Let go of a carried payload that no kernel takes up, or that was never retrieved before the next kexec."""

    def retrieve(self, payload: Payload) -> File:
        """Rebuild the file in the new world; a refusal is for ever, and the payload is gone with it."""
        raise NotImplementedError

    def can_finish(self, _payload: Payload, _status: RetrieveStatus, /) -> bool:
        """Whether FINISH may go on."""
        return True

    def finish(self, payload: Payload, status: RetrieveStatus) -> None:
        """End the file's part in the update; what was not retrieved is destroyed."""
        if status == "untouched":
            self.discard(payload)

    def inspect(self, _payload: Payload, /) -> Mapping[str, object]:
        """Describe the file's data for the harness; JSON values only."""
        return {}


HandlerFactory = Callable[[str], FileHandler]


class HandlerRegistry:
    """The kinds of files an emulated machine has drivers for: kind -> compatible string and factory.

    `board` is what is plugged into the machine, for handlers of device files.
    """

    def __init__(self, board: Board) -> None:
        self.board = board
        self._factories: dict[str, tuple[str, HandlerFactory]] = {}

    def register(self, kind: str, compatible: str, factory: HandlerFactory) -> None:
        """Add a kind. `compatible` is its string in kernels that do not say otherwise."""
        if kind in self._factories:
            raise ValueError(f"handler {kind!r} is registered already")
        self._factories[kind] = (compatible, factory)

    def build(self, strings: Mapping[str, str | None]) -> list[FileHandler]:
        """Make the handlers of a booting kernel. `strings` overrides by kind; None stands for a kernel without that handler."""
        built: list[FileHandler] = []
        for kind, (default, factory) in self._factories.items():
            compatible = strings.get(kind, default)
            if compatible is not None:
                built.append(factory(compatible))
        return built
