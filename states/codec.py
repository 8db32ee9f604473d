# SPDX-License-Identifier: Apache-2.0
"""Events to journal text and back; old versions are upcast here, one version at a time.

A shipped event body is never rewritten on disk. `UPCASTS` maps an old type to the next newer type and a pure function over the
decoded JSON object; chains are followed until a type of `EVENTS` is reached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from .errors import BadEvent, UnknownEvent
from .events import EVENTS, Event

Body = dict[str, Any]
_encoder = msgspec.json.Encoder(order="deterministic")
_decoders: dict[str, msgspec.json.Decoder[Any]] = {}


def _bound_v1(body: Body) -> Body:
    """`session.bound.v1` knew the owner by uid and pid alone, as two fields."""
    old = dict(body)
    uid, pid = old.pop("uid"), old.pop("pid")
    return {**old, "owner": {"uid": uid, "gid": -1, "pid": pid, "cgroup": ""}}


UPCASTS: dict[str, tuple[str, Callable[[Body], Body]]] = {
    "session.bound.v1": ("session.bound.v2", _bound_v1),
}


def encode(event: Event) -> tuple[str, bytes]:
    """Return the type tag and the JSON body of an event; equal events give equal bytes."""
    return event.TYPE, _encoder.encode(event)


def decode(type_tag: str, body: bytes) -> Event:
    """Return the event of a journal row.

    Raises `UnknownEvent` for a type that this version does not know and `BadEvent` for a body that does not fit its type.
    """
    cls = EVENTS.get(type_tag)
    if cls is not None:
        decoder = _decoders.get(type_tag)
        if decoder is None:
            decoder = _decoders[type_tag] = msgspec.json.Decoder(cls)
        try:
            event: Event = decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise BadEvent(
                f"event {type_tag} does not decode: {error}",
                hint="run `luoctl journal verify` on the journal",
            ) from None
        return event
    if type_tag not in UPCASTS:
        raise UnknownEvent(
            f"event type {type_tag[:80]!r} is not known",
            hint="it may come from a newer luod: read this journal with that version",
        )
    try:
        raw: Any = msgspec.json.decode(body)
        while type_tag in UPCASTS:
            type_tag, upcast = UPCASTS[type_tag]
            raw = upcast(raw)
        return msgspec.convert(raw, EVENTS[type_tag])
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise BadEvent(
            f"event {type_tag} does not upcast: {error}", hint="run `luoctl journal verify` on the journal"
        ) from None
