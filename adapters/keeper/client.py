# SPDX-License-Identifier: Apache-2.0
"""luod's side of the keeper: the `Custody` port over `keeper.sock`.

Each call opens one connection, so calls from several threads never mix and a restarted keeper is found without more ado.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from ...states.errors import LuodError
from ..liveupdate import errors as kernel_errors
from .messages import ANSWER_SIZE, let_go, receive, send


class KeeperError(LuodError):
    """The keeper cannot be reached, or refuses."""

    exit_code = 3


class Keeper:
    """The second holder of session fds. `timeout` (seconds) bounds every call but `create` and `retrieve`.

    Those two take what the kernel takes: a call into it is not cancelled, and giving up would leave a session that nobody knows of.
    """

    def __init__(self, directory: Path, *, timeout: float = 30.0) -> None:
        self._path = directory / "keeper.sock"
        self._timeout = timeout

    def _ask(
        self, message: dict[str, Any], fds: tuple[int, ...] = (), *, patient: bool = False
    ) -> tuple[dict[str, Any], int | None]:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(self._timeout)
                sock.connect(str(self._path))
                send(sock, message, fds)
                if patient:
                    sock.settimeout(None)
                answer, got = receive(sock, ANSWER_SIZE)
        except (OSError, ValueError) as error:
            raise KeeperError(
                f"luod-keeper at {self._path} does not answer: {error}",
                hint="start it first: luod-keeper --dir DIR --kernel device|emulated",
            ) from None
        if answer is None:
            raise KeeperError(
                f"luod-keeper at {self._path} hung up", hint="only its own uid and root may ask it"
            )
        if "error" in answer:
            let_go(got)
            raise rebuilt(answer["error"])
        let_go(got[1:])
        return answer, got[0] if got else None

    def boot_id(self) -> str:
        """Return the boot id that the keeper's kernel reports."""
        return str(self._ask({"do": "BOOT_ID"})[0]["boot_id"])

    def names(self) -> list[str]:
        """Return the names held, one for each fd, in the order in which they came."""
        found: list[str] = []
        after, more = 0, True
        while more:
            answer, _ = self._ask({"do": "NAMES", "after": after})
            found += [str(name) for name in answer["names"]]
            after, more = int(answer["last"]), bool(answer["more"])
        return found

    def get(self, name: str) -> int | None:
        """Return a copy of the newest fd held under a name, or None."""
        return self._ask({"do": "GET", "name": name})[1]

    def create(self, name: str) -> int:
        """Let the keeper make CREATE_SESSION and hold the session; return a copy. Raises `KernelError`."""
        return self._fd({"do": "CREATE", "name": name})

    def retrieve(self, name: str) -> int:
        """Let the keeper make RETRIEVE_SESSION and hold the session; return a copy. Raises `KernelError`."""
        return self._fd({"do": "RETRIEVE", "name": name})

    def _fd(self, message: dict[str, Any]) -> int:
        _, fd = self._ask(message, patient=True)
        if fd is None:
            raise KeeperError(f"luod-keeper answered {message['do']} {message['name']} without an fd")
        return fd

    def store(self, name: str, fd: int) -> None:
        """Hand the keeper a copy of `fd`, in place of what it holds under the name."""
        self._ask({"do": "STORE", "name": name}, (fd,))

    def remove(self, name: str) -> None:
        """Let the keeper close what it holds under a name."""
        self._ask({"do": "REMOVE", "name": name})


def rebuilt(body: dict[str, Any]) -> LuodError:
    """Return the error that the keeper met, as the class it was."""
    if body["kind"] != "kernel":
        return KeeperError(str(body["message"]), hint=str(body["hint"]))
    cls = getattr(kernel_errors, str(body["class"]), kernel_errors.KernelError)
    error: LuodError = cls(
        str(body["operation"]), str(body["subject"]), int(body["errno"]), hint=str(body["hint"])
    )
    error.message = str(body["message"])
    return error
