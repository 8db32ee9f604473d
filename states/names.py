# SPDX-License-Identifier: Apache-2.0
"""How things are called: client ids, session ids, update ids, kernel session names and tokens.

The kernel allows 63 bytes for a session name, systemd recognises 38, and the name `systemd` is its own
(include/uapi/linux/liveupdate.h; systemd src/shared/luo-util.c). So every kernel name starts with `luod.` and is hashed
when it would be longer than 38 characters.
"""

from __future__ import annotations

import hashlib
import re

from .errors import BadName

CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
KERNEL_NAME_MAX = 38
PREFIX = "luod."
BLACK_BOX_SESSION = PREFIX + "internal"
SCRATCH_SESSION = PREFIX + "scratch"
BLACK_BOX_CLIENT = "luod"
MARKER_TOKEN = 0x6C756F646D61726B
"""Token of the marker that luod preserves in every session: ASCII `luodmark`."""
BLACK_BOX_TOKEN = 0x6C756F6472696E67
"""Token of the black-box ring in `luod.internal`: ASCII `luodring`."""


def check_client_id(client: str) -> str:
    """Return `client` when it is a legal client id.

    Raises `BadName` for an id that is empty, over 128 characters, or has a character outside `[A-Za-z0-9._-]`.
    """
    if CLIENT_ID.match(client):
        return client
    raise BadName(
        f"client id {client[:140]!r} is not allowed",
        hint="use 1 to 128 characters from [A-Za-z0-9._-], starting with a letter or a digit",
    )


def session_id(client: str, attempt: int) -> str:
    """Name attempt `attempt` (from 1) of `client`: the stream of its events in the journal."""
    return f"{client}.{attempt}"


def update_id(number: int) -> str:
    """Name update `number` (from 1): the stream of its events in the journal."""
    return f"update/{number}"


def kernel_name(session: str) -> str:
    """Name the kernel session of a session id, at most 38 characters, equal ids giving equal names."""
    name = PREFIX + session
    if len(name) <= KERNEL_NAME_MAX and name not in (BLACK_BOX_SESSION, SCRATCH_SESSION):
        return name
    digest = hashlib.blake2b(session.encode(), digest_size=8).hexdigest()
    head = session[: KERNEL_NAME_MAX - len(PREFIX) - len(digest) - 1]
    return f"{PREFIX}{head}~{digest}"


def token_text(token: int) -> str:
    """Write a token (u64) as lower-case hex text: JSON readers lose precision above 2**53."""
    return f"{token:#x}"


def parse_token(text: str) -> int:
    """Read a token from hex (`0x1a`) text; raises `BadName` outside u64."""
    try:
        value = int(text, 16) if text.lower().startswith("0x") else -1
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 64:
        raise BadName(f"token {text[:40]!r} is not a u64 in hex", hint='write it as "0x1a"')
    return value
