# SPDX-License-Identifier: Apache-2.0
"""Golden events: what was once written must be read for ever, and read as what it meant.

One file for each type and version that ever was in a journal. A file is never edited: a changed meaning is a new version with a new
file and an upcaster. `python tests/states/test_golden.py` writes the files that are missing, and no other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from luod.states import codec, fold
from luod.states.errors import BadEvent, UnknownEvent
from luod.states.events import EVENTS, Event, Owner, SessionBound

GOLDEN = Path(__file__).parent / "golden"
TYPES = sorted({*EVENTS, *codec.UPCASTS})


def full(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Make a body in which every field says something."""
    return {field.encode_name: value(field.type, field.name) for field in msgspec.structs.fields(kind)}


def value(kind: Any, name: str) -> Any:
    info = msgspec.inspect.type_info(kind)
    match info:
        case msgspec.inspect.IntType():
            return 7
        case msgspec.inspect.FloatType():
            return 2.5
        case msgspec.inspect.BoolType():
            return True
        case msgspec.inspect.StrType():
            return f"some {name}"
        case msgspec.inspect.LiteralType():
            return sorted(info.values)[0]
        case msgspec.inspect.VarTupleType():
            return [value(kind.__args__[0], name)]
        case msgspec.inspect.DictType():
            return {"name": "value", "n": 1}
        case msgspec.inspect.StructType():
            return full(info.cls)
    raise AssertionError(f"no example for {kind}")


def path_of(type_tag: str) -> Path:
    return GOLDEN / f"{type_tag}.json"


@pytest.mark.parametrize("type_tag", TYPES)
def test_every_version_has_a_golden_file_that_is_read(type_tag: str) -> None:
    event = codec.decode(type_tag, path_of(type_tag).read_bytes().strip())
    assert isinstance(event, Event)
    tag, body = codec.encode(event)
    assert tag in EVENTS
    assert codec.decode(tag, body) == event


@pytest.mark.parametrize("type_tag", sorted(EVENTS))
def test_the_current_version_is_written_as_it_always_was(type_tag: str) -> None:
    """A renamed or dropped field, a new required one, or another default shows here."""
    golden = path_of(type_tag).read_bytes().strip()
    known = json.loads(golden)
    _, body = codec.encode(codec.decode(type_tag, golden))
    written = json.loads(body)
    assert {key: written[key] for key in known} == known
    added = set(written) - set(known)
    required = {field.encode_name for field in msgspec.structs.fields(EVENTS[type_tag]) if field.required}
    assert not added & required, "a field that old journals do not have needs a default"


def test_no_golden_file_is_orphaned() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.json")) == TYPES


def test_an_old_binding_is_upcast() -> None:
    old = codec.decode("session.bound.v1", path_of("session.bound.v1").read_bytes())
    assert old == SessionBound("vm1", 1, Owner(1000, -1, 4242), "optional", 30.0)
    session = fold.evolve(fold.Session(id="vm1.1"), old, fold.At(1, "boot", 1, 1))
    assert session.owner is not None
    assert (session.owner.uid, session.anomalies) == (1000, ())


@pytest.mark.parametrize(
    ("type_tag", "body", "error"),
    [
        ("session.teleported.v1", b"{}", UnknownEvent),
        ("session.bound.v99", b"{}", UnknownEvent),
        ("session.created.v1", b"{}", BadEvent),
        ("session.created.v1", b"not json", BadEvent),
        ("session.created.v1", b'{"update":1,"kernel_name":"x"}', BadEvent),
        ("session.created.v1", b'{"update":"u","kernel_name":"x","surprise":1}', BadEvent),
        ("session.created.v1", b"\xff\xfe", BadEvent),
        ("session.bound.v1", b'{"client":"a"}', BadEvent),
        ("session.bound.v1", b"[]", BadEvent),
    ],
)
def test_what_cannot_be_read_is_named(type_tag: str, body: bytes, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        codec.decode(type_tag, body)
    assert type_tag.rsplit(".", 1)[0] in str(caught.value)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for tag, cls in EVENTS.items():
        if not path_of(tag).exists():
            path_of(tag).write_bytes(codec.encode(msgspec.convert(full(cls), cls))[1] + b"\n")
