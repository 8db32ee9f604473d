# SPDX-License-Identifier: Apache-2.0
"""A client as luo-agent's public README describes it: a socket, lines of JSON, and fds. It knows nothing of luod.

The kernel's calls are given as functions, as a VMM would make them itself.
"""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class _Agent:
    def __init__(self, sock_path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(sock_path)
        self.buffer = b""
        self.fds: list[int] = []

    def send(self, **message: object) -> None:
        self.sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        while b"\n" not in self.buffer:
            data, control, _, _ = self.sock.recvmsg(4096, socket.CMSG_SPACE(array.array("i").itemsize))
            for level, kind, payload in control:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    self.fds += array.array("i", payload)
            if not data:
                return None
            self.buffer += data
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)  # type: ignore[no-any-return]

    def wait_fd(self, event: str, seen: list[dict[str, Any]]) -> int:
        while True:
            message = self.receive()
            if message is None:
                raise EOFError(f"the agent hung up before {event}; it said {seen}")
            seen.append(message)
            if message.get("event") == event:
                return self.fds.pop(0)


def readme_first_boot(
    sock_path: str, id: str, preserve: Callable[[int], object], ready: Callable[[], object] = lambda: None
) -> list[dict[str, Any]]:
    """Subscribe, preserve when asked, say READY, and wait for the kexec to end this process.

    Returns what the agent said, only if it hangs up instead. `ready` is called once READY is sent.
    """
    agent, seen = _Agent(sock_path), list[dict[str, Any]]()
    agent.send(cmd="SUBSCRIBE", id=id)
    session = agent.wait_fd("START_PRESERVATION", seen)
    preserve(session)
    agent.send(cmd="READY")
    ready()
    while (message := agent.receive()) is not None:
        seen.append(message)
    os.close(session)
    agent.sock.close()
    return seen


def readme_second_boot(sock_path: str, id: str, retrieve_finish: Callable[[int], T]) -> T:
    """Claim the session, let `retrieve_finish` take what is in it and run FINISH, and close it; return what that gave."""
    agent = _Agent(sock_path)
    try:
        agent.send(cmd="CLAIM", id=id)
        session = agent.wait_fd("SESSION", [])
        try:
            return retrieve_finish(session)
        finally:
            os.close(session)
    finally:
        agent.sock.close()
