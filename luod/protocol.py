# SPDX-License-Identifier: Apache-2.0
"""The messages: every command that a client may send, as a struct.

A command carries `cmd`, and `seq` when it wants a reply. Fields that luod does not know are ignored, so that an older luod serves a
newer client. Ids and tokens are checked here, so what reaches the engine is well-formed. `python -m luod.protocol` prints the schema.
"""

from __future__ import annotations

import difflib
import sys
from typing import Annotated, Any, Literal

import msgspec

from . import replies
from .states import events as ev
from .states.errors import BadName
from .states.names import check_client_id, parse_token, token_text
from .wire import MAX_SEQ, ProtocolError

Text = Annotated[str, msgspec.Meta(max_length=4096)]
Short = Annotated[str, msgspec.Meta(max_length=256)]
Errno = Annotated[str, msgspec.Meta(pattern=r"^[A-Z][A-Z0-9_]{0,31}$")]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86400)]
Token = Annotated[str, msgspec.Meta(pattern=r"^0[xX][0-9a-fA-F]{1,16}$", description="u64 in hex")]
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=86_400_000)]
Order = Annotated[int, msgspec.Meta(ge=-1000, le=1000)]
Spans = Annotated[dict[Short, Milliseconds], msgspec.Meta(max_length=16)]
Policy = ev.Policy
Devices = ev.Devices


class Command(msgspec.Struct, frozen=True, tag_field="cmd"):
    """Base of all commands; with a `seq` it is answered by a reply of that number."""

    seq: Annotated[int, msgspec.Meta(ge=0, le=MAX_SEQ)] | None = None


class ClientCommand(Command, frozen=True, kw_only=True):
    """Base of what a client says of its own session; the id is checked against its alphabet."""

    id: str


class DeclaredStep(msgspec.Struct, frozen=True):
    """One call that must succeed between RETRIEVE_FD and FINISH."""

    step: Short
    args: dict[str, Any] = {}


class Declared(msgspec.Struct, frozen=True):
    """One preserved object; `size` in bytes."""

    token: Token
    kind: Short = "memfd"
    size: Annotated[int, msgspec.Meta(ge=0)] = 0
    label: Short = ""
    checksum: Short = ""
    plan: tuple[DeclaredStep, ...] = ()


class Hello(Command, frozen=True, tag="HELLO"):
    """Agree on version and features; whoever does not say it speaks the plain luo-agent protocol."""

    version: int = 1
    features: tuple[Short, ...] = ()


class Ping(Command, frozen=True, tag="PING"):
    """Ask whether luod answers."""


class Subscribe(ClientCommand, frozen=True, tag="SUBSCRIBE", kw_only=True):
    """Take part in updates under an id."""

    policy: Policy = "required"
    deadline_s: Seconds | None = None
    order: Order = 0
    devices: Devices = "preserve"


class Unsubscribe(ClientCommand, frozen=True, tag="UNSUBSCRIBE", kw_only=True):
    """Take no further part."""


class Preserved(ClientCommand, frozen=True, tag="PRESERVED", kw_only=True):
    """Everything is preserved, still running; this is what."""

    resources: tuple[Declared, ...] = ()


class Ready(ClientCommand, frozen=True, tag="READY", kw_only=True):
    """Writers are stopped; the kexec may come. `resources` are what was preserved after that, `spans` how long its parts took."""

    id: str = ""
    resources: tuple[Declared, ...] = ()
    spans: Spans = {}


class Nack(ClientCommand, frozen=True, tag="NACK", kw_only=True):
    """Cannot follow this update."""

    errno: Errno
    message: Text = ""
    token: Token | None = None


class Aborted(ClientCommand, frozen=True, tag="ABORTED", kw_only=True):
    """The session fd is closed after an ABORT."""


class Adopt(ClientCommand, frozen=True, tag="ADOPT", kw_only=True):
    """Hand a session fd back to a restarted luod."""

    fds: int = 0


class Claim(ClientCommand, frozen=True, tag="CLAIM", kw_only=True):
    """Ask for the session back, in the new kernel."""


class Restored(ClientCommand, frozen=True, tag="RESTORED", kw_only=True):
    """A step of a restore plan has an outcome."""

    token: Token
    step: Short
    ok: bool
    errno: Errno | None = None
    took_ms: Milliseconds = 0.0


class Finished(ClientCommand, frozen=True, tag="FINISHED", kw_only=True):
    """FINISH has run; luod checks."""


class Status(Command, frozen=True, tag="STATUS"):
    """Ask for the host at a glance."""


class Clients(Command, frozen=True, tag="CLIENTS", kw_only=True):
    """Ask who is connected; with `after`, for those behind that id."""

    after: Short = ""


class Sessions(Command, frozen=True, tag="SESSIONS", kw_only=True):
    """Ask for all sessions; with `after`, for those behind that id."""

    after: Short = ""


class SessionQuery(Command, frozen=True, tag="SESSION", kw_only=True):
    """Ask for one session, by its id or its client's."""

    id: Short


class Journal(Command, frozen=True, tag="JOURNAL", kw_only=True):
    """Ask for records after a journal id."""

    after: Annotated[int, msgspec.Meta(ge=0)] = 0
    limit: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1000
    stream: Short | None = None


class Watch(Command, frozen=True, tag="WATCH", kw_only=True):
    """Ask to be sent every record from now on, or from a journal id on."""

    after: Annotated[int, msgspec.Meta(ge=0)] | None = None


class Load(Command, frozen=True, tag="LOAD", kw_only=True):
    """Load the next kernel."""

    kernel: Text
    initrd: Text | None = None
    cmdline: Text = ""


class Kexec(Command, frozen=True, tag="KEXEC", kw_only=True):
    """Begin an update, or go on with one that waits for a person."""

    force: bool = False
    deadline_s: Seconds | None = None


class Abort(Command, frozen=True, tag="ABORT", kw_only=True):
    """Undo the running update, or one session."""

    id: Short | None = None
    reason: Short = ""


class Resolve(Command, frozen=True, tag="RESOLVE", kw_only=True):
    """Settle an effect in doubt."""

    key: Short
    decision: Literal["done", "absent", "retry", "give-up"]


AnyCommand = (
    Hello | Ping | Subscribe | Unsubscribe | Preserved | Ready | Nack | Aborted | Adopt | Claim | Restored | Finished
    | Status | Clients | Sessions | SessionQuery | Journal | Watch | Load | Kexec | Abort | Resolve
)  # fmt: skip
COMMANDS: dict[str, type[Command]] = {str(cls.__struct_config__.tag): cls for cls in AnyCommand.__args__}
_QUOTED = 400


def parse_command(obj: dict[str, Any]) -> Command:
    """Return the command of a message; its token, if it has one, in the one spelling that the journal uses.

    Raises `ProtocolError` with code UNKNOWN_COMMAND, BAD_FIELD or BAD_ID, saying which field and what is allowed.
    """
    verb = obj.get("cmd")
    if not isinstance(verb, str):
        raise ProtocolError(
            "UNKNOWN_COMMAND", "a message without a cmd", hint='commands look like {"cmd":"PING"}'
        )
    cls = COMMANDS.get(verb)
    if cls is None:
        near = difflib.get_close_matches(verb[:60].upper(), COMMANDS, 3, 0.5)
        raise ProtocolError(
            "UNKNOWN_COMMAND",
            f"{verb[:60]!r} is no command",
            hint=f"did you mean {' or '.join(near)}?" if near else "docs/protocol.md lists the commands",
        )
    try:
        command = msgspec.convert(obj, cls)
    except msgspec.ValidationError as error:
        text = str(error)  # it may quote the value, and a reply must fit in a line
        said = text if len(text) <= _QUOTED else f"{text[: _QUOTED // 2]} ... {text[-_QUOTED // 2 :]}"
        raise ProtocolError("BAD_FIELD", f"{verb}: {said}", hint="docs/protocol.md has the fields") from None
    if isinstance(command, ClientCommand) and (command.id or not isinstance(command, Ready)):
        try:
            check_client_id(command.id)
        except BadName as error:
            raise ProtocolError("BAD_ID", f"{verb}: {error.message}", hint=error.hint) from None
    if isinstance(command, Restored | Nack) and command.token is not None:
        command = msgspec.structs.replace(command, token=token_text(parse_token(command.token)))
    return command


def to_resource(declared: Declared) -> ev.Resource:
    """Turn a declared object into what the journal keeps; equal tokens get equal text."""
    plan = tuple(ev.Step(step.step, step.args) for step in declared.plan)
    token = token_text(parse_token(declared.token))
    return ev.Resource(token, declared.kind, declared.size, declared.label, declared.checksum, plan)


def schema() -> dict[str, Any]:
    """Return the JSON schemas of all messages: `commands`, `events`, the reply to each command, and a `refusal`."""
    kinds: list[Any] = [AnyCommand, replies.AnyEvent, replies.Refusal, *replies.REPLIES.values()]
    (commands, events, refusal, *answers), shared = msgspec.json.schema_components(
        kinds, ref_template="#/$defs/{name}"
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "commands": commands,
        "events": events,
        "replies": dict(zip(replies.REPLIES, answers, strict=True)),
        "refusal": refusal,
        "$defs": shared,
    }


CODES: dict[str, str] = {
    "ALREADY_CLAIMED": "another living process has the session",
    "ALREADY_SUBSCRIBED": "another living process speaks for the id",
    "BAD_FDS": "not the fds that the message needs",
    "BAD_FIELD": "a field is missing, of the wrong type or out of range",
    "BAD_ID": "an id outside its alphabet",
    "BAD_IMAGE": "the kernel image or initrd cannot be read",
    "BAD_JSON": "a line that is not JSON",
    "BAD_SEQ": "a request number that JSON readers cannot keep",
    "BAD_UTF8": "a line that is not UTF-8",
    "BAD_VERSION": "a protocol version that does not exist",
    "CUSTODY": "the second holder of session fds cannot be reached, or refuses",
    "ENDED": "the session has reached its end",
    "FDS_MISSING": "a message names fds that did not come",
    "FDS_TRUNCATED": "fds were lost on the way",
    "GONE": "a session fd is no longer held",
    "INTERNAL": "luod itself failed at the command",
    "IN_DOUBT": "an effect of the session is under way or in doubt",
    "JOURNAL": "the journal cannot be read or written",
    "KERNEL": "the kernel refused",
    "LIMIT": "the caller uses more than one uid may",
    "LINE_TOO_LONG": "a line over the limit",
    "LOST": "the kernel no longer holds the session",
    "NO_IMAGE": "no next kernel is loaded",
    "NO_UPDATE": "no update runs",
    "NOT_ALLOWED": "an admin's verb from somebody who is none",
    "NOT_FINISHED": "FINISH has not run on the session",
    "NOT_IN_DOUBT": "no such effect is in doubt",
    "NOT_OBJECT": "a line that is no JSON object",
    "NOT_SUBSCRIBED": "the connection does not speak for the id",
    "NOT_YOURS": "the id belongs to another user",
    "OPEN_STEPS": "steps of the restore plan have no good outcome yet",
    "OUT_OF_ORDER": "the command does not fit the state of the session",
    "TOO_DEEP": "a message nested too deeply",
    "TOO_LATE": "it can no longer be undone",
    "TOO_MANY_FDS": "more fds than messages",
    "UNFINISHED": "sessions of the last update are not finished",
    "UNKNOWN_COMMAND": "no such command",
    "UNKNOWN_ID": "no such session for this caller",
    "UPDATE_RUNNING": "an update runs already",
}
"""Every error code of the protocol with its meaning; docs/protocol.md repeats it and a test compares."""


if __name__ == "__main__":
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(schema())).decode() + "\n")
