# SPDX-License-Identifier: Apache-2.0
"""The keeper holds what it was given or has made itself, whatever becomes of those who asked."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from keeper_rig import PATIENCE_S, GatedKernel, Rig, closing, open_fds

from luod.adapters.keeper import messages, server
from luod.adapters.keeper.client import Keeper as Client
from luod.adapters.keeper.client import KeeperError
from luod.adapters.keeper.server import Keeper, KeeperTaken
from luod.adapters.liveupdate import errors as kernel_errors
from luod.engine.ports import Kernel

NAME = "luod.vm1.1"
REQUESTER = """
import sys
from pathlib import Path
from luod.adapters.keeper.client import Keeper
Keeper(Path(sys.argv[1])).create(sys.argv[2])
"""


@pytest.mark.parametrize("verb", ["create", "retrieve"])
def test_the_keeper_makes_the_call_and_holds_the_session(rig: Rig, verb: str) -> None:
    fd = getattr(rig.client, verb)(NAME)
    with closing(fd):
        assert rig.kernel.calls == [(verb, NAME)]
        assert rig.same(NAME, fd)
        assert not os.get_inheritable(fd)
    assert rig.client.names() == [NAME]


def test_what_is_held_is_given_again_without_a_call(rig: Rig) -> None:
    first, second, third = rig.client.create(NAME), rig.client.create(NAME), rig.client.retrieve(NAME)
    with closing(first, second, third):
        assert len({os.fstat(fd).st_ino for fd in (first, second, third)}) == 1
    assert rig.kernel.calls == [("create", NAME)]


def check_killed_requester(kind: type[Keeper], directory: Path) -> None:
    """Kill the requester while the kernel works for it; the session must be held nevertheless."""
    with Rig(directory, kind=kind) as rig:
        rig.kernel.gate.clear()
        requester = subprocess.Popen([sys.executable, "-c", REQUESTER, str(directory), NAME])
        try:
            assert rig.kernel.entered.wait(PATIENCE_S)
        finally:
            requester.kill()
            requester.wait(PATIENCE_S)
        rig.client.names()  # by now the keeper has seen it go
        rig.kernel.gate.set()
        for _ in range(
            1000
        ):  # until the made session has come to the keeper's loop: one who asks before would count as waiting
            if NAME in rig.client.names():
                break
        assert rig.kernel.calls == [("create", NAME)]
        with closing(rig.client.create(NAME)):
            assert rig.kernel.calls == [("create", NAME)], "the session of the dead requester was dropped"


def test_a_requester_killed_before_the_reply_loses_nothing(tmp_path: Path) -> None:
    check_killed_requester(Keeper, tmp_path / "run")


class KeepsForTheLivingOnly(Keeper):
    """A mutant: what nobody waits for any more is closed."""

    def _woken(self) -> None:
        for made in list(self._made):
            if made.fd is not None and all(peer.fileno() < 0 for peer in self._waiting.get(made.name, [])):
                self._made.remove(made)
                del self._waiting[made.name]
                os.close(made.fd)
        super()._woken()


def test_a_keeper_that_forgets_the_dead_is_caught(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="dropped"):
        check_killed_requester(KeepsForTheLivingOnly, tmp_path / "run")


def test_a_call_that_blocks_holds_up_nobody_else(rig: Rig) -> None:
    with closing(os.memfd_create("other")) as (other,):
        rig.client.store("other", other)
        rig.kernel.gate.clear()
        got: list[int] = []
        waiting = threading.Thread(target=lambda: got.append(rig.client.create(NAME)))
        waiting.start()
        assert rig.kernel.entered.wait(PATIENCE_S)
        assert rig.client.names() == ["other"]
        assert rig.same("other", other)
        assert rig.client.boot_id() == rig.kernel.boot_id()
        rig.client.remove("other")
    rig.kernel.gate.set()
    waiting.join()
    with closing(*got):
        assert rig.client.names() == [NAME]


def test_two_who_ask_at_once_get_one_session(rig: Rig) -> None:
    rig.kernel.gate.clear()
    got: list[int] = []
    threads = [threading.Thread(target=lambda: got.append(rig.client.create(NAME))) for _ in range(2)]
    threads[0].start()
    assert rig.kernel.entered.wait(PATIENCE_S)
    threads[1].start()
    rig.kernel.gate.set()
    for thread in threads:
        thread.join()
    with closing(*got):
        assert len({os.fstat(fd).st_ino for fd in got}) == 1
    assert rig.kernel.calls == [("create", NAME)]


@pytest.mark.parametrize(
    "kind", [kernel_errors.SessionExists, kernel_errors.DeviceBusy, kernel_errors.KernelError]
)
def test_a_refusal_of_the_kernel_comes_through_as_it_is(
    rig: Rig, kind: type[kernel_errors.KernelError]
) -> None:
    rig.kernel.error = kind("CREATE_SESSION", repr(NAME), errno.EEXIST, detail="so it is", hint="do that")
    with pytest.raises(kernel_errors.KernelError) as caught:
        rig.client.create(NAME)
    error = caught.value
    assert (type(error), error.operation, error.subject, error.errno) == (
        kind,
        "CREATE_SESSION",
        repr(NAME),
        errno.EEXIST,
    )
    assert (str(error), error.exit_code) == (str(rig.kernel.error), kind.exit_code)
    assert rig.client.names() == []
    rig.kernel.error = None
    with closing(rig.client.create(NAME)):
        assert rig.client.names() == [NAME]


def test_any_other_fault_of_a_call_is_answered(rig: Rig) -> None:
    rig.kernel.error = ZeroDivisionError("of the driver")
    with pytest.raises(KeeperError, match="ZeroDivisionError"):
        rig.client.create(NAME)


def test_store_get_remove(rig: Rig) -> None:
    assert rig.client.get("a") is None
    with closing(os.memfd_create("one"), os.memfd_create("two")) as (one, two):
        rig.client.store("a", one)
        assert rig.same("a", one)
        rig.client.store("a", two)
        assert (rig.copies(one), rig.copies(two)) == (1, 2), "what was replaced is closed"
        assert rig.same("a", two)
        assert rig.client.names() == ["a"]
        rig.client.remove("a")
        rig.client.remove("a")
        assert rig.client.get("a") is None
        assert rig.copies(two) == 1


def test_the_last_copy_goes_with_remove(rig: Rig) -> None:
    read, write = os.pipe()
    with closing(read):
        rig.client.store("end", write)
        os.close(write)
        os.set_blocking(read, False)
        with pytest.raises(BlockingIOError):
            os.read(read, 1)
        rig.client.remove("end")
        assert os.read(read, 1) == b""


def test_limit(tmp_path: Path) -> None:
    with Rig(tmp_path / "run", limit=2) as rig, closing(os.memfd_create("x")) as (fd,):
        rig.client.store("a", fd)
        with closing(rig.client.create("b")):
            pass
        for ask in (lambda: rig.client.create("c"), lambda: rig.client.store("c", fd)):
            with pytest.raises(KeeperError, match=r"the limit is 2 \(raise --max"):
                ask()
        assert [name for _, name in rig.kernel.calls] == ["b"], "nothing may be made that cannot be held"
        rig.client.store("a", fd)
        rig.client.remove("a")
        with closing(rig.client.create("c")):
            assert rig.client.names() == ["b", "c"]


def test_a_session_that_is_being_made_has_its_place(tmp_path: Path) -> None:
    with Rig(tmp_path / "run", limit=1) as rig, closing(os.memfd_create("x")) as (fd,):
        rig.kernel.gate.clear()
        got: list[int] = []
        waiting = threading.Thread(target=lambda: got.append(rig.client.create(NAME)))
        waiting.start()
        assert rig.kernel.entered.wait(PATIENCE_S)
        with pytest.raises(KeeperError, match="the limit is 1"):
            rig.client.store("a", fd)
        rig.kernel.gate.set()
        waiting.join()
        with closing(*got):
            assert rig.client.names() == [NAME]


def test_thousands_of_names(tmp_path: Path, many_fds: None) -> None:
    count = min(6000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200)
    names = [f"luod.a-client-with-a-long-name-{n}.1" for n in range(count)]
    assert sum(map(len, names)) > messages.PAGE_BYTES, "one page would do"
    with Rig(tmp_path / "run", limit=count) as rig, closing(os.memfd_create("x")) as (fd,):
        for name in names:
            rig.client.store(name, fd)
        assert rig.client.names() == names
        rig.client.remove(names[17])
        assert rig.client.names() == names[:17] + names[18:]


BAD = {
    "nested": b"[" * 4000,
    "no JSON": b"{nope",
    "no UTF-8": b"\xff\xfe",
    "no object": b"[1]",
    "empty object": b"{}",
    "unknown": b'{"do":"DANCE"}',
    "no text": b'{"do":["GET"]}',
    "no name": b'{"do":"GET"}',
    "empty name": b'{"do":"CREATE","name":""}',
    "long name": json.dumps({"do": "CREATE", "name": "x" * 256}).encode(),
    "name with a colon": b'{"do":"CREATE","name":"a:b"}',
    "name with a newline": b'{"do":"REMOVE","name":"a\\nb"}',
    "number for a name": b'{"do":"RETRIEVE","name":7}',
    "bad page": b'{"do":"NAMES","after":"x"}',
    "too long": b'{"do":"GET","name":"' + b"x" * messages.REQUEST_SIZE + b'"}',
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("count", [0, 3])
def test_a_bad_request_is_answered_and_costs_nothing(rig: Rig, what: str, count: int) -> None:
    with closing(os.memfd_create("x")) as (fd,):
        rig.client.store("kept", fd)
        answer = rig.ask_raw(BAD[what], (fd,) * count)
        assert answer is not None
        assert answer["error"]["message"]
        assert rig.client.names() == ["kept"]
        assert rig.copies(fd) == 2
    assert rig.kernel.calls == []


@pytest.mark.parametrize("count", [0, 2, 253])
def test_store_takes_exactly_one_fd(rig: Rig, count: int) -> None:
    with closing(os.memfd_create("x")) as (fd,):
        answer = rig.ask_raw(b'{"do":"STORE","name":"a"}', (fd,) * count)
        assert answer is not None
        assert "needs one fd" in answer["error"]["message"]
        assert rig.client.names() == []
        assert rig.copies(fd) == 1


def test_an_empty_message_with_fds_leaves_none_behind(rig: Rig) -> None:
    with closing(os.memfd_create("x")) as (fd,):
        assert rig.ask_raw(b"", (fd,) * 10) is None
        assert rig.client.names() == []
        assert rig.copies(fd) == 1


def test_a_peer_that_goes_with_its_requests_unread_leaves_nothing(rig: Rig) -> None:
    with closing(os.memfd_create("x")) as (fd,):
        rig.client.store("a", fd)
        for _ in range(20):
            with rig.connect() as sock:
                for _ in range(5):
                    sock.sendmsg([b'{"do":"GET","name":"a"}'], [])
        assert rig.client.names() == ["a"]
        assert rig.copies(fd) == 2


def test_a_fault_of_the_keeper_costs_one_peer(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with closing(os.memfd_create("x")) as (fd,):
        rig.client.store("kept", fd)
        with monkeypatch.context() as patch:
            patch.setattr(rig.keeper._store, "newest", lambda name: 1 // 0)
            with pytest.raises(KeeperError, match="hung up"):
                rig.client.get("kept")
        assert rig.same("kept", fd)
    assert "ZeroDivisionError" in capfd.readouterr().err


# -- one keeper to a directory


def test_a_second_keeper_is_refused_and_changes_nothing(rig: Rig) -> None:
    with closing(rig.client.create(NAME)):
        pass
    inodes = {path.name: path.stat().st_ino for path in rig.dir.iterdir()}
    with pytest.raises(KeeperTaken, match="another luod-keeper") as caught:
        Keeper(rig.dir, cast(Kernel, GatedKernel()))
    assert caught.value.exit_code == 3
    assert {path.name: path.stat().st_ino for path in rig.dir.iterdir()} == inodes
    assert rig.client.names() == [NAME]


def test_a_place_that_cannot_be_bound_leaves_nothing_open(tmp_path: Path) -> None:
    before = open_fds()
    with pytest.raises(OSError, match="path too long"):
        Keeper(tmp_path / ("d" * 100), cast(Kernel, GatedKernel()))
    assert open_fds() == before


def test_no_keeper(tmp_path: Path) -> None:
    with pytest.raises(KeeperError, match=r"does not answer.*start it first") as caught:
        Client(tmp_path).names()
    assert caught.value.exit_code == 3


def test_a_keeper_that_is_stuck_is_not_waited_for(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, cast(Kernel, GatedKernel()))  # nobody serves it
    try:
        with pytest.raises(KeeperError, match="timed out"):
            Client(tmp_path, timeout=0.05).names()
    finally:
        keeper.close()


# -- who may ask


STRANGER = """
import socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
try:
    sock.connect(sys.argv[1])
    sock.send(b'{"do":"GET","name":"luod.vm1.1"}')
    answer, fds, _, _ = socket.recv_fds(sock, 65536, 16)
    print(len(answer), len(fds))
except OSError as error:
    print(type(error).__name__)
"""


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that every uid can reach."""
    directory = Path(tempfile.mkdtemp(prefix="luod-keeper-", dir="/tmp"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def ask_as(uid: int, path: Path) -> str:
    extra: dict[str, Any] = {"user": uid, "group": uid, "extra_groups": []} if uid else {}
    result = subprocess.run(
        ["/usr/bin/env", "python3", "-I", "-c", STRANGER, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
        **extra,
    )
    return result.stdout.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_another_uid_gets_nothing(open_dir: Path) -> None:
    with Rig(open_dir / "run") as rig:
        with closing(rig.client.create(NAME)):
            pass
        path = rig.dir / "keeper.sock"
        assert path.stat().st_mode & 0o777 == 0o600
        assert (rig.dir / "keeper.notify").stat().st_mode & 0o777 == 0o600
        assert ask_as(0, path) == "13 1"
        assert ask_as(65534, path) == "PermissionError"
        path.chmod(0o666)  # as if somebody had opened it: the credentials of the peer still count
        assert ask_as(65534, path) in ("0 0", "ConnectionResetError", "BrokenPipeError")


# -- fds are not for children


def check_inheritance(rig: Rig) -> None:
    """What the keeper has received must not reach a process that it might start."""
    with closing(os.memfd_create("x")) as (fd,):
        rig.client.store("a", fd)
    held = rig.keeper._store.newest("a")
    assert held is not None
    assert not os.get_inheritable(held), "a held fd would be inherited"


def test_held_fds_are_not_inherited(rig: Rig) -> None:
    check_inheritance(rig)


def test_a_keeper_that_leaves_fds_inheritable_is_caught(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaves_inheritable(sock: Any, size: int) -> Any:
        message, fds = messages.receive(sock, size)
        for fd in fds:
            os.set_inheritable(fd, True)
        return message, fds

    monkeypatch.setattr(server, "receive", leaves_inheritable)
    with pytest.raises(AssertionError, match="would be inherited"):
        check_inheritance(rig)
