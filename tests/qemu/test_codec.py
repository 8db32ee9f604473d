# SPDX-License-Identifier: Apache-2.0
"""The codec against the package qemu.qmp, message by message: on a recorded conversation, on made-up ones, and cut anywhere."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qmp_peer import GARBLED, ours, theirs

from luod.adapters.qemu.codec import Codec, Event, Failure, Greeting, Return
from luod.adapters.qemu.errors import QmpGarbled

RECORDED = (Path(__file__).parent / "recorded" / "qemu-10.0.2-save.jsonl").read_bytes()
GREETING = b'{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "Debian"}, "capabilities": ["oob"]}}\r\n'
PENDING = {"luod-1", "luod-2", "luod-3"}


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


# -- streams

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ids = st.sampled_from([*sorted(PENDING), "luod-9"]) | values
right = st.one_of(
    st.fixed_dictionaries(
        {"event": st.sampled_from(["STOP", "MIGRATION"])},
        optional={
            "data": st.dictionaries(st.text(max_size=5), values, max_size=2),
            "timestamp": st.fixed_dictionaries({"seconds": st.integers(), "microseconds": st.integers()}),
        },
    ),
    st.fixed_dictionaries({"return": values, "id": st.sampled_from(sorted(PENDING))}),
    st.fixed_dictionaries(
        {
            "error": st.fixed_dictionaries({"class": st.just("GenericError"), "desc": st.text()}),
            "id": st.sampled_from(sorted(PENDING)),
        }
    ),
)
odd = st.fixed_dictionaries(
    {},
    optional={
        "return": values,
        "error": values | st.fixed_dictionaries({"class": values, "desc": values}),
        "id": ids,
        "QMP": values,
    },
)
text_lines = st.builds(lambda body, ascii_only: json.dumps(body, ensure_ascii=ascii_only).encode(errors="surrogatepass"),
                       right | odd | values, st.booleans())  # fmt: skip
broken = st.binary(max_size=12) | st.builds(
    lambda line, n: line[: n % (len(line) + 1)], text_lines, st.integers(0)
)
ends = st.sampled_from([b"\r\n", b"\n", b" \n"])


def lines_of(kind: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    line = st.builds(lambda body, end: body.replace(b"\n", b"") + end, kind, ends)
    return st.lists(line, max_size=6).map(b"".join)


good_lines = st.builds(lambda body: json.dumps(body).encode(), right)
greetings = st.just(GREETING) | st.builds(
    lambda body: json.dumps({"QMP": body}).encode() + b"\n",
    st.fixed_dictionaries(
        {
            "version": values,
            # Not a text: to the other side that is a sequence as well, although its own words are "JSON array".
            "capabilities": values.filter(lambda value: not isinstance(value, str))
            | st.lists(st.text(), max_size=2),
        }
    ),
)


@given(lines_of(good_lines), st.lists(st.integers(0), max_size=5))
def test_both_read_the_same_in_good_streams(lines: bytes, places: list[int]) -> None:
    stream = GREETING + lines
    found = ours(cut(stream, places), PENDING)
    assert found == theirs(stream, PENDING)
    assert GARBLED not in found


@given(greetings, lines_of(text_lines | broken), st.lists(st.integers(0), max_size=5))
def test_both_stop_at_the_same_place_in_bad_streams(greeting: bytes, lines: bytes, places: list[int]) -> None:
    stream = greeting + lines
    assert ours(cut(stream, places), PENDING) == theirs(stream, PENDING)


@given(st.lists(st.integers(0), max_size=20))
def test_both_read_the_same_in_a_recorded_conversation(places: list[int]) -> None:
    asked = {f"luod-{n}" for n in range(1, 40)}
    found = ours(cut(RECORDED, places), asked)
    assert found == theirs(RECORDED, asked)
    assert len(found) == RECORDED.count(b"\n")


def test_byte_by_byte() -> None:
    asked = {f"luod-{n}" for n in range(1, 40)}
    assert ours([bytes([byte]) for byte in RECORDED], asked) == ours([RECORDED], asked)


# -- what it says


def conversation(*lines: bytes) -> tuple[Codec, list[object]]:
    codec = Codec()
    found: list[object] = list(codec.feed(GREETING))
    codec.negotiate()
    for line in lines:
        found += codec.feed(line)
    return codec, found


def test_messages_mean_what_they_say() -> None:
    codec, found = conversation(
        b'{"return": {}, "id": "luod-1"}\r\n{"timestamp": {"seconds": 5, "microseconds": 500000}, "event": "STOP"}\r\n',
        b'{"event": "MIGRATION", "data": {"status": "setup"}, "timestamp": {"seconds": -1, "microseconds": -1}}\n',
    )
    assert found == [
        Greeting("10.0.2", "Debian", ("oob",)),
        Return("luod-1", {}),
        Event("STOP", {}, 5.5),
        Event("MIGRATION", {"status": "setup"}, 0.0),
    ]
    number, line = codec.request("migrate", {"uri": "file:/dev/fdset/1"})
    assert json.loads(line) == {"execute": "migrate", "id": number, "arguments": {"uri": "file:/dev/fdset/1"}}
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1
    answer = json.dumps({"id": number, "error": {"class": "GenericError", "desc": "no"}}).encode() + b"\n"
    assert codec.feed(answer) == [Failure(number, "GenericError", "no")]
    assert codec.feed(answer) == []  # each answer once
    assert codec.pending == set()


def test_what_json_cannot_carry_is_not_asked_for() -> None:
    codec = Codec()
    with pytest.raises(TypeError):
        codec.request("x", {"fd": object()})
    with pytest.raises(ValueError, match="JSON compliant"):
        codec.request("x", {"n": float("nan")})
    assert codec.pending == set()


@pytest.mark.parametrize("whole", [True, False], ids=["with its end", "before its end comes"])
def test_a_line_may_not_grow_for_ever(whole: bool) -> None:
    codec = Codec(max_line=200)
    codec.feed(GREETING)
    event = b'{"event": "%s"}'
    fits = event % (b"x" * (200 - len(event) + 2))
    assert len(fits) == 200
    assert [type(each) for each in codec.feed(fits + b"\n")] == [Event]
    assert codec.feed(fits) == []
    found = codec.feed(b" \n" if whole else b" ")
    assert [type(each) for each in found] == [QmpGarbled]
    assert "200 bytes" in str(found[0])
    assert codec.feed(b'\n{"event": "STOP"}\n') == []  # nothing after it is believed


def test_good_messages_before_a_bad_one_count() -> None:
    _, found = conversation(
        b'{"return": 1, "id": "luod-1"}\n{"event": "STOP"}\nSegmentation fault\n{"event": "RESUME"}\n'
    )
    assert [type(each) for each in found[1:]] == [Return, Event, QmpGarbled]
    assert "Segmentation fault" in str(found[-1])


def test_deep_nesting_is_garbled_and_no_crash() -> None:
    _, found = conversation(b'{"event": ' + b"[" * 200_000 + b"\n")
    assert isinstance(found[-1], QmpGarbled)
