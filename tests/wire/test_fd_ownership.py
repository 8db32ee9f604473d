# SPDX-License-Identifier: Apache-2.0
"""An fd goes to the message that it was sent with or to nobody: not even bad lines, cut reads and a lack of descriptors can mix them up."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from luod import fdpass
from luod.wire import MAX_FDS, MAX_LINE, Decoder, Frame, ProtocolError, encode


class Sent(NamedTuple):
    """A line as a peer sends it: in one call, with so many fds."""

    kind: str
    fds: int


BAD = {
    "no JSON": b"{broken\n",
    "no UTF-8": b"\xff\xfe\n",
    "no object": b"[]\n",
    "bad count": b'{"fds":"many"}\n',
    "too deep": b"[" * 20 + b"]" * 20 + b"\n",
    "too long": b"x" * (MAX_LINE + 10) + b"\n",
    "empty": b"\n",
}
LINES = st.one_of(
    st.builds(Sent, st.just("good"), st.integers(0, 3)),
    st.builds(Sent, st.sampled_from(sorted(BAD)), st.integers(0, 3)),
    st.builds(Sent, st.just("silent"), st.integers(0, 3)),
)


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


def close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


@contextlib.contextmanager
def no_fd_left() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


def check_ownership(kind: type[Decoder], lines: Sequence[Sent], sizes: Sequence[int]) -> None:
    """Send lines through a socket and read them in pieces of the given sizes: each message has its own fds and no others."""
    mixed: list[str] = []
    with no_fd_left():
        ours, theirs = socket.socketpair()
        with ours, theirs:
            for end in (ours, theirs):
                end.setblocking(False)
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                theirs.setsockopt(socket.SOL_SOCKET, option, 8 << 20)
            sent: list[list[int]] = []
            for number, line in enumerate(lines):
                fds = [os.memfd_create(f"fd{number}") for _ in range(line.fds)]
                if line.kind == "good":
                    data = encode({"cmd": "X", "seq": number, "fds": line.fds})
                elif line.kind == "silent":  # brings fds that it does not name
                    data = encode({"cmd": "X", "seq": number})
                else:
                    data = BAD[line.kind]
                fdpass.send_all(theirs, data, fds)
                sent.append([inode(fd) for fd in fds])
                close(fds)
            theirs.shutdown(socket.SHUT_WR)
            decoder, turn, seen = kind(), 0, list[int]()
            while (frames := fdpass.receive_frames(ours, decoder, sizes[turn % len(sizes)])) is not None:
                turn += 1
                for frame in frames:
                    if not isinstance(frame, Frame):
                        continue
                    number = frame.obj["seq"]
                    seen.append(number)
                    want = sent[number] if lines[number].kind == "good" else []
                    if [inode(fd) for fd in frame.fds] != want:
                        mixed.append(f"line {number} of {lines} read in {sizes}")
                    close(frame.fds)
            decoder.close()
    assert not mixed, f"fds went to another message: {mixed}"
    assert seen == [n for n, line in enumerate(lines) if line.kind in ("good", "silent")], (
        "a good line was lost"
    )


@given(
    st.lists(LINES, max_size=8),
    st.lists(st.sampled_from([1, 5, 17, 100, 65536]) | st.integers(20, 4000), min_size=1, max_size=4),
)
@example([Sent("no JSON", 1), Sent("good", 1)], [5])
@example([Sent("too long", 1), Sent("good", 1)], [65536])
@example([Sent("silent", 2), Sent("good", 1)], [65536])
@example([Sent("silent", 1), Sent("good", 2), Sent("no UTF-8", 3), Sent("good", 3)], [17])
def test_no_message_gets_the_fd_of_another(lines: list[Sent], sizes: list[int]) -> None:
    sizes = [max(size, 4096) for size in sizes] if any(line.kind == "too long" for line in lines) else sizes
    check_ownership(Decoder, lines, sizes)


class OneQueue(Decoder):
    """A mutant: whatever has come is for whoever asks next."""

    def feed(
        self, data: bytes, fds: Sequence[int] = (), *, truncated: bool = False
    ) -> list[Frame | ProtocolError]:
        self._fds = deque((self._feeds + 1, fd) for _, fd in self._fds)
        return super().feed(data, fds, truncated=truncated)

    def _drop(self, until: int) -> None:
        if self._buffer and not self._skipping and until < self._feeds:
            return
        super()._drop(until)


def test_a_decoder_with_one_queue_is_caught() -> None:
    with pytest.raises(AssertionError, match="went to another message"):  # noqa: PT012  (at one of the sizes)
        for size in range(1, 40):
            check_ownership(OneQueue, [Sent("no JSON", 1), Sent("good", 1)], [size])


class KeepsTheRest(Decoder):
    """A mutant: surplus fds stay open."""

    def _drop(self, until: int) -> None:
        self._fds = deque(one for one in self._fds if one[0] > until)


def test_a_decoder_that_leaves_surplus_open_is_caught() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(AssertionError):
        check_ownership(KeepsTheRest, [Sent("silent", 2)], [100])
    for name in set(os.listdir("/proc/self/fd")) - before:
        with contextlib.suppress(OSError):
            os.close(int(name))


# -- a lack of descriptors


@contextlib.contextmanager
def room_for(count: int) -> Iterator[None]:
    """Let this process open only so many more descriptors, at the lowest numbers that are free."""
    listed = [int(name) for name in os.listdir("/proc/self/fd")]
    used = {
        number for number in listed if os.path.islink(f"/proc/self/fd/{number}")
    }  # the listing's own is closed by now
    free = [number for number in range(max(used) + count + 2) if number not in used]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[count], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize("room", [0, 1, 2])
def test_out_of_descriptors_costs_the_message_that_needs_them(
    pair: tuple[socket.socket, socket.socket], room: int
) -> None:
    ours, theirs = pair
    with no_fd_left():
        decoder = Decoder()
        fds = [os.memfd_create("x") for _ in range(3)]
        fdpass.send_all(theirs, b'{"cmd":"PING"}\n{"cmd":"A","seq":4,"fds":3}\n{"cmd":"PING"}\n', fds)
        close(fds)
        with room_for(room):
            out = fdpass.receive_frames(ours, decoder)
        assert out is not None
        first, fault, last = out
        assert first == last == Frame({"cmd": "PING"}, [])
        assert isinstance(fault, ProtocolError)
        assert (fault.code, fault.seq) == ("FDS_TRUNCATED", 4)
        assert "RLIMIT_NOFILE" in fault.hint


def test_a_cut_line_that_lost_its_fds_says_so_when_it_is_whole(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    with no_fd_left():
        decoder = Decoder()
        fd = os.memfd_create("x")
        fdpass.send_all(theirs, b'{"cmd":"A",', [fd])
        os.close(fd)
        with room_for(0):
            assert fdpass.receive_frames(ours, decoder) == []
        fdpass.send_all(theirs, b'"fds":1}\n{"cmd":"B","fds":1}\n')
        out: Any = fdpass.receive_frames(ours, decoder)
        assert [one.code for one in out] == ["FDS_TRUNCATED", "FDS_MISSING"]


def test_the_plain_receive_says_so_too(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    with no_fd_left():
        fds = [os.memfd_create("x") for _ in range(3)]
        fdpass.send_all(theirs, b"x\n", fds)
        close(fds)
        with room_for(1), pytest.raises(fdpass.FdsTruncated):
            fdpass.receive(ours)


def test_the_most_fds_that_fit_in_one_message(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    with no_fd_left():
        fd = os.memfd_create("x")
        fdpass.send_all(theirs, encode({"cmd": "A", "fds": MAX_FDS}), [fd] * MAX_FDS)
        os.close(fd)
        (frame,) = fdpass.receive_frames(ours, Decoder()) or []
        assert isinstance(frame, Frame)
        assert len(frame.fds) == MAX_FDS
        assert not any(os.get_inheritable(one) for one in frame.fds)
        close(frame.fds)
        with pytest.raises(OSError, match="Invalid argument"):
            fdpass.send(theirs, b"x", [0] * (MAX_FDS + 1))


def test_fds_with_no_bytes_end_nothing_and_stay_nowhere(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    with no_fd_left():
        fd = os.memfd_create("x")
        fdpass.send(theirs, b"", [fd])
        os.close(fd)
        fdpass.send_all(theirs, b'{"cmd":"PING"}\n')
        assert fdpass.receive_frames(ours, Decoder()) == [Frame({"cmd": "PING"}, [])]
        theirs.shutdown(socket.SHUT_WR)
        assert fdpass.receive_frames(ours, Decoder()) is None


def test_what_equal_keys_mean() -> None:
    assert Decoder().feed(b'{"cmd":"PING","cmd":"STATUS"}\n') == [Frame({"cmd": "STATUS"}, [])]
