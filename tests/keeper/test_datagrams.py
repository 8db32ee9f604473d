# SPDX-License-Identifier: Apache-2.0
"""The keeper takes systemd's fd-store datagrams as systemd does."""

from __future__ import annotations

import os
import select
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keeper_rig import Rig, closing, open_fds

from luod.adapters.keeper import messages
from luod.adapters.keeper.store import FdStore, StoreFull


def test_store_by_name_and_remove(rig: Rig) -> None:
    with closing(os.memfd_create("x")) as (fd,):
        rig.notify("FDSTORE=1", "FDNAME=luod.vm1.1", "FDPOLL=0", fds=(fd,))
        rig.barrier()
        assert rig.client.names() == ["luod.vm1.1"]
        assert rig.same("luod.vm1.1", fd)
        rig.notify("FDSTOREREMOVE=1", "FDNAME=luod.vm1.1")
        rig.barrier()
        assert rig.client.names() == []


def test_a_name_may_have_several_fds_and_the_newest_counts(rig: Rig) -> None:
    with closing(os.memfd_create("one"), os.memfd_create("two"), os.memfd_create("three")) as (
        one,
        two,
        three,
    ):
        rig.notify("FDSTORE=1", "FDNAME=a", "FDPOLL=0", fds=(one, two))
        rig.notify("FDSTORE=1", "FDNAME=a", "FDPOLL=0", fds=(three,))
        rig.barrier()
        assert rig.client.names() == ["a", "a", "a"]
        assert rig.same("a", three)
        assert [rig.copies(fd) for fd in (one, two, three)] == [2, 2, 2]
        rig.notify("FDSTOREREMOVE=1", "FDNAME=a")
        rig.barrier()
        assert rig.client.names() == []
        assert [rig.copies(fd) for fd in (one, two, three)] == [1, 1, 1]


def test_the_barrier_comes_after_all_before_it(rig: Rig) -> None:
    with closing(os.memfd_create("x")) as (fd,):
        for number in range(30):
            rig.notify("FDSTORE=1", f"FDNAME=n{number}", "FDPOLL=0", fds=(fd,))
        rig.barrier()
        assert len(rig.client.names()) == 30


def test_an_fd_whose_other_end_is_gone_is_dropped_unless_it_must_not_be(rig: Rig) -> None:
    polled, far = socket.socketpair()
    kept, kept_far = socket.socketpair()
    with polled, kept, far, kept_far:
        rig.notify("FDSTORE=1", "FDNAME=polled", fds=(polled.fileno(),))
        rig.notify("FDSTORE=1", "FDNAME=kept", "FDPOLL=0", fds=(kept.fileno(),))
        rig.barrier()
        assert rig.client.names() == ["polled", "kept"]
        kept_far.close()
        far.close()
        rig.client.boot_id()  # the hang-ups were there before this request came
        assert rig.client.names() == ["kept"]
        assert (rig.copies(polled.fileno()), rig.copies(kept.fileno())) == (1, 2)


def test_a_file_that_cannot_be_polled_is_kept(rig: Rig) -> None:
    with closing(os.memfd_create("x")) as (fd,):
        rig.notify("FDSTORE=1", "FDNAME=memory", fds=(fd,))
        rig.barrier()
        assert rig.same("memory", fd)


def test_over_the_limit_the_fd_is_closed_and_said_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Rig(tmp_path / "run", limit=2) as rig, closing(os.memfd_create("x")) as (fd,):
        rig.notify("FDSTORE=1", "FDNAME=a", "FDPOLL=0", fds=(fd,) * 5)
        rig.barrier()
        assert rig.client.names() == ["a", "a"]
        assert rig.copies(fd) == 3
    assert "a cannot be stored: 2 fds are held, the limit is 2" in capfd.readouterr().err


@pytest.mark.parametrize("lines", [["READY=1"], ["FDSTORE=0"], [""], ["=", "x", "FDNAME=b"], ["FDSTORE=1\r"]])
def test_what_is_not_for_the_store_is_passed_over(rig: Rig, lines: list[str]) -> None:
    with closing(os.memfd_create("x")) as (fd,):
        rig.notify(*lines, fds=(fd, fd))
        rig.barrier()
        assert rig.client.names() == []
        assert rig.copies(fd) == 1


@pytest.mark.parametrize("name", ["a:b", "x" * 256, "tab\tname", "", "\N{SNOWMAN}"])
def test_names_that_systemd_would_not_take(rig: Rig, name: str) -> None:
    with closing(os.memfd_create("x")) as (fd,):
        rig.notify("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=(fd,))
        rig.barrier()
        assert rig.client.names() == ["stored"]


@given(st.binary(max_size=300))
def test_no_datagram_is_too_odd_to_read(data: bytes) -> None:
    said = messages.notice(data)
    assert messages.fit_name(said.name)


def test_an_event_older_than_the_fd_does_not_close_it() -> None:
    """The number of a closed fd may be another's by the time its event is looked at."""
    with select.epoll() as poll:
        store = FdStore(8, poll)
        near, far = socket.socketpair()
        number = near.detach()
        store.keep("first", number, watched=True)
        far.close()
        assert [fd for fd, _ in poll.poll(0)] == [number]
        store.remove("first")
        near, far = socket.socketpair()
        os.dup2(near.fileno(), number)
        store.keep("second", number, watched=True)
        near_number = near.detach()
        os.close(near_number) if near_number != number else None
        assert store.hung_up(number) is None
        assert store.newest("second") == number
        far.close()
        assert store.hung_up(number) == "second"
        assert len(store) == 0


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["keep", "remove"])), max_size=30),
    st.integers(1, 8),
)
def test_the_store_against_a_model(steps: list[tuple[str, str]], limit: int) -> None:
    before = open_fds()
    with select.epoll() as poll:
        store = FdStore(limit, poll)
        model: list[tuple[str, int]] = []
        for name, what in steps:
            if what == "keep":
                try:
                    store.require_room(name)
                except StoreFull:
                    assert len(model) == limit
                    continue
                fd = os.dup(poll.fileno())
                store.keep(name, fd)
                model.append((name, fd))
            else:
                assert store.remove(name) == any(one == name for one, _ in model)
                model = [one for one in model if one[0] != name]
            assert len(store) == len(model)
            for one in "abc":
                assert store.newest(one) == next((fd for n, fd in reversed(model) if n == one), None)
            pages: list[str] = []
            after, more = 0, True
            while more:
                names, after, more = store.page(after, 11)
                pages += names
            assert pages == [one for one, _ in model]
        store.close()
        assert open_fds() == before + 1
