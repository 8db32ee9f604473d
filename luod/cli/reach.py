# SPDX-License-Identifier: Apache-2.0
"""How luoctl reaches luod."""

from __future__ import annotations

import os
from typing import Any

from ..client import Client
from ..conversation import TransportError

CALL_S = 30.0


class NotASocket(TransportError):
    """What `--socket` names cannot be luod's socket."""


def connect(path: str, *, retry_until: float | None = None) -> Client:
    """Connect to luod; with `retry_until`, a monotonic time, try again until then. Raises `TransportError`."""
    if os.path.isdir(path):
        raise NotASocket(
            f"luod cannot be reached at {path}: it is a directory",
            hint=f"name the socket in it: --socket {os.path.join(path, 'liveupdate.sock')}",
        )
    return Client.connect(path, CALL_S, retry_until=retry_until)


def ask(path: str, command: str, *, timeout: float | None = None, **fields: Any) -> dict[str, Any]:
    """Ask one question; the answer may take `timeout` seconds. Raises `TransportError` and `ClientError`."""
    with connect(path) as client:
        return client.call(command, timeout=timeout, **fields).fields
