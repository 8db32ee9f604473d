# SPDX-License-Identifier: Apache-2.0
"""Lines and fds come out as they went in, however the stream cuts them; and each check here catches the decoder that gets it wrong."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luod import fdpass
from luod.conversation import implied_fds
from luod.wire import MAX_DEPTH, MAX_FDS, MAX_LINE, Decoder, Frame, ProtocolError, encode

Receive = Callable[[socket.socket, Decoder, int], "list[Frame | ProtocolError] | None"]
MESSAGES: list[dict[str, Any]] = [
    {"cmd": "PING", "seq": 1},
    {"cmd": "SUBSCRIBE", "id": "vm1", "note": 'brackets }]{[ and "quotes" in \\ text'},
    {"event": "RESUME", "reason": "ünïcödé ☃ \x00"},
    {"cmd": "PRESERVED", "id": "vm1", "resources": [{"token": "0x1a", "plan": [{"step": "a", "args": {}}]}]},
]


@contextlib.contextmanager
def no_fd_left() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


def marked(count: int) -> list[int]:
    """Make fds that can be told apart."""
    return [os.memfd_create(f"mark{number}") for number in range(count)]


def inodes(fds: Sequence[int]) -> list[int]:
    return [os.fstat(fd).st_ino for fd in fds]


def close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


# -- the checks, each for any decoder or receiver


def check_every_split(decoder: type[Decoder]) -> None:
    """All messages come out in order, whether in one read, byte by byte, or cut in two anywhere."""
    stream = b"".join(encode(one) for one in MESSAGES)
    cuts = [[stream], [stream[at : at + 1] for at in range(len(stream))]]
    cuts += [[stream[:at], stream[at:]] for at in range(len(stream) + 1)]
    for parts in cuts:
        made = decoder()
        out = [frame for part in parts for frame in made.feed(part)]
        assert out == [Frame(one, []) for one in MESSAGES]


def check_fds_follow_their_message(decoder: type[Decoder], receive: Receive, cuts: Sequence[int]) -> None:
    """Sent through a real socket in pieces of the sizes `cuts`, each message has the fds that were sent with it, closed on exec."""
    with no_fd_left():
        ours, theirs = socket.socketpair()
        with ours, theirs:
            plan = [0, 2, 0, 1, 3]
            want: list[list[int]] = []
            for number, count in enumerate(plan):
                line = encode({"cmd": "X", "seq": number, "fds": count})
                fds = marked(count)
                want.append(inodes(fds))
                size = max(1, cuts[number % len(cuts)])
                fdpass.send(theirs, line[:size], fds)
                for at in range(size, len(line), size):
                    fdpass.send(theirs, line[at : at + size])
                close(fds)
            theirs.shutdown(socket.SHUT_WR)
            made = decoder()
            got: list[list[int]] = []
            turn = 0
            while (frames := receive(ours, made, max(1, cuts[turn % len(cuts)]))) is not None:
                turn += 1
                for frame in frames:
                    assert isinstance(frame, Frame), frame
                    try:
                        assert not any(os.get_inheritable(fd) for fd in frame.fds)
                        got.append(inodes(frame.fds))
                    finally:
                        close(frame.fds)
            made.close()
            assert got == want


def test_every_split() -> None:
    check_every_split(Decoder)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=8))
def test_fds_follow_their_message(cuts: list[int]) -> None:
    check_fds_follow_their_message(Decoder, fdpass.receive_frames, cuts)


@pytest.mark.parametrize("size", range(1, 40))
def test_fds_at_every_size(size: int) -> None:
    check_fds_follow_their_message(Decoder, fdpass.receive_frames, [size])


# -- decoders that are wrong in one way each


class DropsTheSecondLine(Decoder):
    def feed(
        self, data: bytes, fds: Sequence[int] = (), *, truncated: bool = False
    ) -> list[Frame | ProtocolError]:
        out = super().feed(data, fds, truncated=truncated)
        for frame in out[1:]:
            if isinstance(frame, Frame):
                close(frame.fds)
        return out[:1]


class LosesASplitLine(Decoder):
    def feed(
        self, data: bytes, fds: Sequence[int] = (), *, truncated: bool = False
    ) -> list[Frame | ProtocolError]:
        self._buffer.clear()
        return super().feed(data, fds, truncated=truncated)


def receive_inheritable(
    sock: socket.socket, decoder: Decoder, size: int
) -> list[Frame | ProtocolError] | None:
    data, fds, _, _ = socket.recv_fds(sock, size, MAX_FDS)
    for fd in fds:
        os.set_inheritable(fd, True)
    return decoder.feed(data, fds) if data else None


def receive_without_fds(
    sock: socket.socket, decoder: Decoder, size: int
) -> list[Frame | ProtocolError] | None:
    data = sock.recv(size)  # the kernel closes what is not asked for
    return decoder.feed(data) if data else None


@pytest.mark.parametrize("mutant", [DropsTheSecondLine, LosesASplitLine])
def test_the_split_check_bites(mutant: type[Decoder]) -> None:
    with pytest.raises(AssertionError):
        check_every_split(mutant)


@pytest.mark.parametrize(
    ("decoder", "receive"),
    [
        (LosesASplitLine, fdpass.receive_frames),
        (DropsTheSecondLine, fdpass.receive_frames),
        (Decoder, receive_inheritable),
        (Decoder, receive_without_fds),
    ],
    ids=["loses-split", "drops-second", "inheritable", "no-fds"],
)
def test_the_fd_check_bites(decoder: type[Decoder], receive: Receive) -> None:
    with no_fd_left(), pytest.raises(AssertionError):  # noqa: PT012
        for size in (7, 200):
            check_fds_follow_their_message(decoder, receive, [size])


# -- limits


def test_a_line_of_exactly_the_limit() -> None:
    fits = {"x": "y" * (MAX_LINE - len('{"x":""}\n'))}
    line = encode(fits)
    assert len(line) == MAX_LINE
    assert Decoder().feed(line) == [Frame(fits, [])]
    with pytest.raises(ProtocolError, match="does not fit") as caught:
        encode({"x": fits["x"] + "y"})
    assert caught.value.code == "LINE_TOO_LONG"
    too_long = line[:-3] + b'y"}\n'
    for size in (1000, MAX_LINE, len(too_long)):
        decoder = Decoder()
        out = [one for at in range(0, len(too_long), size) for one in decoder.feed(too_long[at : at + size])]
        assert [getattr(one, "code", "") for one in out] == ["LINE_TOO_LONG"]
        assert decoder.feed(b'{"next":1}\n') == [Frame({"next": 1}, [])]


def test_depth() -> None:
    def nested(depth: int) -> bytes:
        return b'{"x":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}\n"

    assert isinstance(Decoder().feed(nested(MAX_DEPTH))[0], Frame)
    (fault,) = Decoder().feed(nested(MAX_DEPTH + 1))
    assert isinstance(fault, ProtocolError)
    assert fault.code == "TOO_DEEP"
    text = json.dumps({"x": "[" * 1000 + '\\"{' * 100}).encode() + b"\n"
    assert isinstance(Decoder().feed(text)[0], Frame)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"\xff", "BAD_UTF8"),
        (b"nonsense", "BAD_JSON"),
        (b"{'a':1}", "BAD_JSON"),
        (b'{"a":NaN}', "BAD_JSON"),
        (b"[]", "NOT_OBJECT"),
        (b"7", "NOT_OBJECT"),
        (b'{"fds":"1"}', "BAD_FDS"),
        (b'{"fds":1.5}', "BAD_FDS"),
        (b'{"fds":254}', "BAD_FDS"),
        (b'{"fds":1}', "FDS_MISSING"),
        (b'{"seq":-1}', "BAD_SEQ"),
        (b'{"seq":1e99}', "BAD_SEQ"),
        (b'{"seq":9007199254740992}', "BAD_SEQ"),
    ],
)
def test_a_bad_line_costs_itself_only(line: bytes, code: str) -> None:
    good = encode(MESSAGES[0])
    out = Decoder().feed(good + line + b"\n" + b"\n   \n" + good)
    assert out[0] == out[2] == Frame(MESSAGES[0], [])
    assert isinstance(out[1], ProtocolError)
    assert out[1].code == code
    assert len(out) == 3


# -- fds that nobody takes


@pytest.mark.parametrize(
    "data",
    [
        b'{"cmd":"PING"}\n',
        b"garbage\n",
        b"\n",
        b'{"cmd":"A","fds":1}\n',
        b'{"cmd":"A","fds":7}\n',
        b'{"fds":-1}\n',
    ],
)
def test_surplus_fds_are_closed(data: bytes) -> None:
    with no_fd_left():
        for frame in Decoder().feed(data, marked(3)):
            if isinstance(frame, Frame):
                close(frame.fds)


def test_fds_of_an_unfinished_line_wait_for_it() -> None:
    with no_fd_left():
        decoder = Decoder()
        fds = marked(2)
        want = inodes(fds)
        assert decoder.feed(b'{"cmd":"A",', fds) == []
        (frame,) = decoder.feed(b'"fds":2}\n')
        assert isinstance(frame, Frame)
        assert inodes(frame.fds) == want
        close(frame.fds)
        assert decoder.feed(b'{"cmd":"B",', marked(2)) == []
        decoder.close()


def test_fds_of_a_line_never_go_to_another() -> None:
    with no_fd_left():
        decoder = Decoder()
        assert len(decoder.feed(b'broken\n{"cmd":"A",', marked(1))) == 1
        (frame,) = decoder.feed(b'"x":1}\n')
        assert frame == Frame({"cmd": "A", "x": 1}, [])
        (fault,) = decoder.feed(b'{"cmd":"B","fds":1}\n')
        assert isinstance(fault, ProtocolError)
        assert fault.code == "FDS_MISSING"


def test_fds_without_end_are_not_kept_without_end() -> None:
    with no_fd_left():
        decoder = Decoder()
        out: list[Frame | ProtocolError] = []
        for _ in range(3):
            out += decoder.feed(b" ", marked(100))
        assert [getattr(one, "code", "") for one in out] == ["TOO_MANY_FDS"]
        decoder.close()


def test_fds_that_the_kernel_dropped_are_named() -> None:
    decoder = Decoder()
    (fault,) = decoder.feed(b'{"cmd":"A","seq":5,"fds":1}\n', truncated=True)
    assert isinstance(fault, ProtocolError)
    assert (fault.code, fault.seq) == ("FDS_TRUNCATED", 5)
    assert decoder.feed(b'{"cmd":"PING"}\n') == [Frame({"cmd": "PING"}, [])]


def test_the_plain_protocol_implies_fds() -> None:
    with no_fd_left():
        decoder = Decoder(implied=implied_fds)
        fds = marked(2)
        want = inodes(fds)
        (start,) = decoder.feed(b'{"event":"START_PRESERVATION","id":"vm1"}\n', fds[:1])
        (session,) = decoder.feed(b'{"event":"SESSION","id":"vm1"}\n', fds[1:])
        assert isinstance(start, Frame)
        assert isinstance(session, Frame)
        assert inodes([*start.fds, *session.fds]) == want
        close([*start.fds, *session.fds])
        (plain,) = decoder.feed(b'{"event":"PRESERVATION_REQUEST","id":"vm1"}\n')
        assert plain == Frame({"event": "PRESERVATION_REQUEST", "id": "vm1"}, [])
        (none,) = decoder.feed(b'{"event":"START_PRESERVATION","id":"vm1","fds":0}\n')
        assert isinstance(none, Frame)


# -- anything at all

PIECES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"\n", b'{"cmd":"PING","fds":1}\n', b'{"seq":', b"[" * 20, b'"', b"\\", b'{"a":{}}\n']),
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3).map(
        lambda obj: json.dumps(obj).encode() + b"\n"
    ),
)


@given(st.lists(st.tuples(PIECES, st.integers(0, 2)), max_size=20))
def test_no_input_raises_or_leaks(pieces: list[tuple[bytes, int]]) -> None:
    with no_fd_left():
        decoder = Decoder()
        for data, count in pieces:
            for frame in decoder.feed(data, marked(count)):
                assert isinstance(frame, Frame | ProtocolError)
                if isinstance(frame, Frame):
                    close(frame.fds)
                else:
                    assert frame.code
        decoder.close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(
    st.lists(
        st.dictionaries(st.text(max_size=8).filter(lambda key: key not in ("seq", "fds")), JSON), max_size=5
    ),
    st.randoms(use_true_random=False),
)
def test_whatever_is_encoded_is_decoded(messages: list[dict[str, Any]], random: Any) -> None:
    stream = b"".join(encode(one) for one in messages)
    decoder, out = Decoder(), list[Frame | ProtocolError]()
    while stream:
        size = random.randint(1, 30)
        out += decoder.feed(stream[:size])
        stream = stream[size:]
    assert out == [Frame(one, []) for one in messages]
