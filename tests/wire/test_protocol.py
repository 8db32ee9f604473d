# SPDX-License-Identifier: Apache-2.0
"""Every command: read from what a client sends, refused with the field that is wrong, and written down in docs/protocol.md."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luod import protocol
from luod.wire import MAX_SEQ, ProtocolError

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "protocol.md"

FULL: dict[str, dict[str, Any]] = {
    "HELLO": {"version": 1, "features": ["freeze", "inventory", "progress"]},
    "PING": {},
    "SUBSCRIBE": {"id": "vm1", "policy": "best-effort", "deadline_s": 2.5, "order": -3, "devices": "reattach"},
    "UNSUBSCRIBE": {"id": "vm1"},
    "PRESERVED": {
        "id": "vm1",
        "resources": [
            {
                "token": "0x1a", "kind": "memfd", "size": 4096, "label": "ram", "checksum": "ab",
                "plan": [{"step": "map", "args": {"at": 0}}],
            }
        ],
    },
    "READY": {
        "id": "vm1",
        "resources": [
            {"token": "0x40", "kind": "memfd", "size": 1, "label": "vmstate", "checksum": "sha256:00", "plan": []}
        ],
        "spans": {"pause": 0.5},
    },
    "NACK": {"id": "vm1", "errno": "EBUSY", "message": "migrating", "token": "0x1a"},
    "ABORTED": {"id": "vm1"},
    "ADOPT": {"id": "vm1", "fds": 1},
    "CLAIM": {"id": "vm1"},
    "RESTORED": {"id": "vm1", "token": "0x1a", "step": "map", "ok": False, "errno": "EIO", "took_ms": 1.5},
    "FINISHED": {"id": "vm1"},
    "STATUS": {},
    "CLIENTS": {"after": "vm1"},
    "SESSIONS": {"after": "vm1.1"},
    "SESSION": {"id": "vm1.1"},
    "JOURNAL": {"after": 7, "limit": 10, "stream": "vm1.1"},
    "WATCH": {"after": 7},
    "LOAD": {"kernel": "/boot/vmlinuz", "initrd": "/boot/initrd", "cmdline": "kho=on"},
    "KEXEC": {"force": True, "deadline_s": 60.0},
    "ABORT": {"id": "vm1", "reason": "no"},
    "RESOLVE": {"key": "vm1.1/create", "decision": "give-up"},
}  # fmt: skip
NEEDED = {
    "SUBSCRIBE": {"id"}, "UNSUBSCRIBE": {"id"}, "PRESERVED": {"id"}, "NACK": {"id", "errno"}, "ABORTED": {"id"},
    "ADOPT": {"id"}, "CLAIM": {"id"}, "RESTORED": {"id", "token", "step", "ok"}, "FINISHED": {"id"}, "SESSION": {"id"},
    "LOAD": {"kernel"}, "RESOLVE": {"key", "decision"},
}  # fmt: skip


def refused(**message: Any) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        protocol.parse_command(message)
    assert caught.value.code in protocol.CODES
    return caught.value


def test_the_table_of_this_test_is_complete() -> None:
    assert set(FULL) == set(protocol.COMMANDS)
    for name, cls in protocol.COMMANDS.items():
        assert {field.encode_name for field in msgspec.structs.fields(cls)} == {"seq", *FULL[name]}, name


@pytest.mark.parametrize("name", FULL)
def test_round_trip(name: str) -> None:
    message = {"cmd": name, "seq": 3, **FULL[name]}
    command = protocol.parse_command(message)
    assert type(command) is protocol.COMMANDS[name]
    assert json.loads(msgspec.json.encode(command)) == message
    assert protocol.parse_command(json.loads(msgspec.json.encode(command))) == command


@pytest.mark.parametrize("name", FULL)
def test_fields_of_a_newer_client_are_ignored(name: str) -> None:
    known = protocol.parse_command({"cmd": name, **FULL[name]})
    assert protocol.parse_command({"cmd": name, **FULL[name], "newer": [1], "and": {"more": 2}}) == known


@pytest.mark.parametrize("name", FULL)
def test_what_may_be_left_out(name: str) -> None:
    needed = NEEDED.get(name, set())
    protocol.parse_command({"cmd": name, **{key: FULL[name][key] for key in needed}})
    for missing in needed:
        rest = {key: FULL[name][key] for key in needed - {missing}}
        assert missing in refused(cmd=name, **rest).message


@pytest.mark.parametrize("name", FULL)
def test_a_field_of_a_wrong_type_is_named(name: str) -> None:
    for key in FULL[name]:
        error = refused(cmd=name, **{**FULL[name], key: {"wrong": "type"}})
        assert error.code == "BAD_FIELD"
        assert f"$.{key}" in error.message


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("$.policy", {"cmd": "SUBSCRIBE", "id": "a", "policy": "sometimes"}),
        ("$.deadline_s", {"cmd": "SUBSCRIBE", "id": "a", "deadline_s": 86401}),
        ("$.deadline_s", {"cmd": "KEXEC", "deadline_s": -0.1}),
        ("$.order", {"cmd": "SUBSCRIBE", "id": "a", "order": -1001}),
        ("$.devices", {"cmd": "SUBSCRIBE", "id": "a", "devices": "drop"}),
        ("$.spans", {"cmd": "READY", "spans": {f"part{n}": 1.0 for n in range(17)}}),
        ("$.spans[...]", {"cmd": "READY", "spans": {"save": -1.0}}),
        ("$.took_ms", {"cmd": "RESTORED", "id": "a", "token": "0x1", "step": "s", "ok": True, "took_ms": -1}),
        ("$.errno", {"cmd": "NACK", "id": "a", "errno": "busy"}),
        ("$.message", {"cmd": "NACK", "id": "a", "errno": "EBUSY", "message": "x" * 4097}),
        ("$.token", {"cmd": "NACK", "id": "a", "errno": "EBUSY", "token": "26"}),
        ("$.token", {"cmd": "RESTORED", "id": "a", "token": "0x1" + "0" * 16, "step": "s", "ok": True}),
        (
            "$.resources[1].token",
            {"cmd": "PRESERVED", "id": "a", "resources": [{"token": "0x1"}, {"token": 1}]},
        ),
        ("$.resources[0].size", {"cmd": "PRESERVED", "id": "a", "resources": [{"token": "0x1", "size": -1}]}),
        (
            "$.resources[0].plan[0]",
            {"cmd": "PRESERVED", "id": "a", "resources": [{"token": "0x1", "plan": [{}]}]},
        ),
        ("$.decision", {"cmd": "RESOLVE", "key": "k", "decision": "maybe"}),
        ("$.limit", {"cmd": "JOURNAL", "limit": 0}),
        ("$.limit", {"cmd": "JOURNAL", "limit": 1001}),
        ("$.after", {"cmd": "WATCH", "after": -1}),
        ("$.seq", {"cmd": "PING", "seq": -1}),
        ("$.seq", {"cmd": "PING", "seq": MAX_SEQ + 1}),
        ("$.kernel", {"cmd": "LOAD", "kernel": "x" * 4097}),
    ],
)
def test_the_path_to_what_is_wrong(path: str, message: dict[str, Any]) -> None:
    error = refused(**message)
    assert error.code == "BAD_FIELD"
    assert path in error.message
    assert message["cmd"] in error.message


def test_a_refusal_never_repeats_a_whole_line() -> None:
    assert len(refused(cmd="X" * 60000).message) < 500
    assert len(refused(cmd="SUBSCRIBE", id="a", policy="y" * 60000).message) < 500
    assert len(refused(cmd="SUBSCRIBE", id="z" * 60000).message) < 500


@pytest.mark.parametrize("bad", ["", ".a", "-a", "a/b", "a b", "é", "a" * 129, "a\n", "a\0"])
def test_ids_outside_their_alphabet(bad: str) -> None:
    assert refused(cmd="SUBSCRIBE", id=bad).code == "BAD_ID"
    if bad:
        assert refused(cmd="READY", id=bad).code == "BAD_ID"


def test_tokens_have_one_spelling() -> None:
    for text in ("0x1A", "0X1a", "0x001a"):
        command: Any = protocol.parse_command(
            {"cmd": "RESTORED", "id": "a", "token": text, "step": "s", "ok": True}
        )
        assert command.token == "0x1a"
        assert protocol.to_resource(protocol.Declared(text)).token == "0x1a"


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("SUB_SCRIBE", "SUBSCRIBE"), ("subscribe", "SUBSCRIBE"), ("READ_Y", "READY"), ("STATE", "STATUS")],
)
def test_near_names(typo: str, meant: str) -> None:
    error = refused(cmd=typo)
    assert error.code == "UNKNOWN_COMMAND"
    assert meant in error.hint


def test_what_is_no_command() -> None:
    for cmd in (None, 7, [], "", "XYZZY-1234"):
        assert refused(cmd=cmd).code == "UNKNOWN_COMMAND"
    assert refused().code == "UNKNOWN_COMMAND"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = sorted({key for fields in FULL.values() for key in fields} | {"seq"})


@given(st.sampled_from(sorted(FULL)), st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_any_fields_give_a_command_or_a_refusal(name: str, fields: dict[str, Any]) -> None:
    for base in ({}, FULL[name]):
        try:
            protocol.parse_command({"cmd": name, **base, **fields})
        except ProtocolError as error:
            assert error.code in ("BAD_FIELD", "BAD_ID")  # noqa: PT017


def test_the_schema_can_be_printed() -> None:
    out = subprocess.run([sys.executable, "-m", "luod.protocol"], capture_output=True, text=True, check=True)
    schema = json.loads(out.stdout)
    for name, cls in protocol.COMMANDS.items():
        described = schema["$defs"][cls.__name__]
        assert described["properties"]["cmd"]["enum"] == [name]
        assert described["description"]


# -- the document


def rows_of(heading: str) -> dict[str, str]:
    """Return the table under a heading of docs/protocol.md: its first column without backticks, to the rest of the row."""
    section = re.split(r"^## ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (found,) = [one for one in section if one.startswith(heading + "\n")]
    rows = re.findall(r"^\| `([^`]+)`[^|]*\|(.*)\|$", found, flags=re.MULTILINE)
    assert rows
    assert len({name for name, _ in rows}) == len(rows)
    return {name: rest.strip() for name, rest in rows}


def test_the_document_lists_the_codes() -> None:
    assert rows_of("Error codes") == protocol.CODES


def test_the_document_lists_the_commands_and_their_fields() -> None:
    rows = rows_of("Commands of clients") | rows_of("Commands of observers and admins")
    assert set(rows) == set(protocol.COMMANDS)
    for name, rest in rows.items():
        documented = set(re.findall(r"`(\w+)[?]?`", rest.split("|")[0]))
        assert documented == set(FULL[name]), name
        optional = set(re.findall(r"`(\w+)[?]`", rest.split("|")[0]))
        assert documented - optional == NEEDED.get(name, set()) | ({"fds"} if name == "ADOPT" else set()), (
            name
        )


def test_the_document_lists_the_events() -> None:
    source = "".join(path.read_text() for path in (ROOT / "luod" / "daemon").glob("*.py"))
    sent = set(re.findall(r'"event": "([A-Z_]+)"', source))
    assert set(rows_of("Events")) == sent


def test_every_code_that_is_raised_is_listed() -> None:
    source = "".join(
        path.read_text()
        for folder in ("daemon", ".", "engine")
        for path in (ROOT / "luod" / folder).glob("*.py")
    )
    raised = set(re.findall(r'(?:Refused|ProtocolError)\(\s*"([A-Z_]+)"', source))
    assert raised
    assert raised <= set(protocol.CODES)


def test_the_examples_are_commands() -> None:
    """Every line of the document that a client sends is one that luod understands."""
    lines = re.findall(r"^→ (\{.*\})(?: \+fd)?$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(lines) >= 10
    for line in lines:
        protocol.parse_command(json.loads(line))
