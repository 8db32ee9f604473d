# SPDX-License-Identifier: Apache-2.0
"""Whatever one client does wrong costs that client an answer, and nobody else anything.

All tests share one luod: each one leaves it with the descriptors and the records that it had, still serving.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator

import pytest
from luod_world import Puppet, Wire, World

from luod.client import ClientError
from luod.protocol import CODES


@pytest.fixture(autouse=True)
def unharmed(shared_world: World) -> Iterator[None]:
    """Before and after each test: the same descriptors, and a bystander who is served throughout."""
    world = shared_world
    before = world.resting_fds()
    with world.client() as bystander:
        bystander.ping()
        yield
        assert bystander.ping().fields == {}
        assert bystander.status()["pid"] == world.luod.pid
    assert world.settled_fds(before) == before
    assert "Traceback" not in world.log.read_text(errors="replace")


@pytest.fixture
def still(shared_world: World) -> Iterator[None]:
    """No record is written meanwhile."""

    def rows() -> int:
        with shared_world.client() as admin:
            return int(admin.status()["journal"]["rows"])

    before = rows()
    yield
    assert rows() == before


@pytest.fixture
def wire(shared_world: World) -> Iterator[Wire]:
    with Wire(shared_world.socket) as made:
        yield made


def code(wire: Wire, **message: object) -> str:
    answer = wire.reply(**message)
    assert answer["ok"] is False, answer
    assert answer["error"]["message"]
    return str(answer["error"]["code"])


GARBAGE = {
    b"\xff\xfe\xfd": "BAD_UTF8",
    b"hello": "BAD_JSON",
    b'{"cmd":"PING"': "BAD_JSON",
    b'{"cmd":"PING"}{"cmd":"PING"}': "BAD_JSON",
    b'{"cmd":"\\ud800"}': "BAD_JSON",
    b"[1,2,3]": "NOT_OBJECT",
    b"null": "NOT_OBJECT",
    b"{}": "UNKNOWN_COMMAND",
    b'{"cmd":7}': "UNKNOWN_COMMAND",
    b'{"cmd":"FORMAT"}': "UNKNOWN_COMMAND",
    b'{"cmd":"SUBSCRIBE"}': "BAD_FIELD",
    b'{"cmd":"SUBSCRIBE","id":7}': "BAD_FIELD",
    b'{"cmd":"SUBSCRIBE","id":"x","policy":"maybe"}': "BAD_FIELD",
    b'{"cmd":"SUBSCRIBE","id":"x","deadline_s":-1}': "BAD_FIELD",
    b'{"cmd":"SUBSCRIBE","id":"../etc"}': "BAD_ID",
    b'{"cmd":"SUBSCRIBE","id":""}': "BAD_ID",
    b'{"cmd":"SUBSCRIBE","id":"a\\u0000b"}': "BAD_ID",
    b'{"cmd":"PING","fds":-1}': "BAD_FDS",
    b'{"cmd":"PING","fds":254}': "BAD_FDS",
    b'{"cmd":"PING","fds":true}': "BAD_FDS",
    b'{"cmd":"ADOPT","id":"x","fds":1}': "FDS_MISSING",
    b'{"cmd":"PING","x":' + b"[" * 20 + b"]" * 20 + b"}": "TOO_DEEP",
    b'{"cmd":"PING","x":"' + b"y" * 70000 + b'"}': "LINE_TOO_LONG",
    b'{"cmd":"READY"}': "OUT_OF_ORDER",
    b'{"cmd":"CLAIM","id":"nobody"}': "UNKNOWN_ID",
}


@pytest.mark.parametrize("line", GARBAGE, ids=lambda line: line[:30].decode(errors="replace"))
@pytest.mark.usefixtures("still")
def test_a_bad_line_costs_itself_only(wire: Wire, line: bytes) -> None:
    wire.send(line + b"\n")
    assert wire.error() == GARBAGE[line]
    assert wire.reply(cmd="PING") == {"reply": 77, "ok": True}


@pytest.mark.usefixtures("still")
def test_bad_numbers_of_requests(wire: Wire) -> None:
    for bad in (b"-1", b"1e400", b"123456789012345678901234567890", b'"x"', b"1.5", b"true"):
        wire.send(b'{"cmd":"PING","seq":' + bad + b"}\n")
        assert wire.line()["event"] == "ERROR"
    wire.send(b'{"cmd":"PING","seq":9007199254740991}\n')
    assert wire.line() == {"reply": 9007199254740991, "ok": True}


@pytest.mark.usefixtures("still")
def test_ten_megabytes_in_one_line(wire: Wire) -> None:
    for _ in range(160):
        wire.send(b"x" * 65536)
    wire.send(b"\n")
    assert wire.error() == "LINE_TOO_LONG"
    assert wire.reply(cmd="PING") == {"reply": 77, "ok": True}


@pytest.mark.usefixtures("still")
def test_binary_noise(wire: Wire) -> None:
    noise = bytes((i * 7 + i // 256) % 256 for i in range(200_000)).replace(b"\n", b"")
    wire.send(noise + b"\n")
    while wire.reply(cmd="PING") != {"reply": 77, "ok": True}:
        pass


@pytest.mark.usefixtures("still")
def test_a_thousand_fds(wire: Wire, shared_world: World) -> None:
    before = shared_world.resting_fds()
    with open("/dev/null", "rb") as null:
        for _ in range(10):
            wire.send(b'{"cmd":"PING","seq":1}\n', [null.fileno()] * 100)
            assert wire.line() == {"reply": 1, "ok": True}
        assert shared_world.settled_fds(before) == before
        # Sent with an unfinished line they wait for its end, but not without limit.
        for _ in range(10):
            wire.send(b" ", [null.fileno()] * 100)
        wire.send(b'{"cmd":"PING","seq":2}\n')
        answers = [wire.line()]
        while "reply" not in answers[-1]:
            answers.append(wire.line())
    assert {one["error"]["code"] for one in answers[:-1]} <= {"TOO_MANY_FDS"}
    assert wire.reply(cmd="PING")["ok"] is True
    assert shared_world.settled_fds(before) == before


@pytest.mark.usefixtures("still")
def test_fds_that_nobody_wants_are_closed(wire: Wire, shared_world: World) -> None:
    before = shared_world.resting_fds()
    with open("/dev/null", "rb") as null:
        wire.send(b'{"cmd":"PING","seq":1,"fds":3}\n', [null.fileno()] * 3)
        assert wire.line()["ok"] is True
        wire.send(b'{"cmd":"FORMAT","seq":2,"fds":3}\n', [null.fileno()] * 3)
        assert wire.line()["error"]["code"] == "UNKNOWN_COMMAND"
        wire.send(b'{"cmd":"ADOPT","id":"nobody","seq":3,"fds":1}\n', [null.fileno()])
        assert wire.line()["error"]["code"] == "UNKNOWN_ID"
    assert wire.reply(cmd="PING")["ok"] is True  # by its answer the message before it is done with
    assert shared_world.settled_fds(before) == before


@pytest.mark.usefixtures("still")
def test_half_a_line_with_fds_and_gone(shared_world: World) -> None:
    with Wire(shared_world.socket) as wire, open("/dev/null", "rb") as null:
        wire.send(b'{"cmd":"ADOPT","id":"vm1","fds":5', [null.fileno()] * 5)


@pytest.mark.usefixtures("still")
def test_gone_before_the_answer(shared_world: World) -> None:
    for _ in range(20):
        with Wire(shared_world.socket) as wire:
            wire.send(b'{"cmd":"STATUS","seq":1}\n' * 5)


@pytest.mark.usefixtures("still")
def test_the_client_shuts_its_reading_side(shared_world: World) -> None:
    with Wire(shared_world.socket) as wire:
        wire.sock.shutdown(socket.SHUT_RD)
        with contextlib.suppress(BrokenPipeError):  # luod may have hung up by now
            wire.send(b'{"cmd":"PING","seq":1}\n')


def test_a_reader_who_does_not_read_is_cut_off(shared_world: World) -> None:
    """The answers that it leaves unread fill the socket, then its outbox in luod, and then it is out."""
    with Wire(shared_world.socket) as lazy, shared_world.client() as other:
        lazy.sock.setblocking(False)
        request = b'{"cmd":"JOURNAL","after":0,"seq":1}\n' * 50
        with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012
            while True:
                try:
                    lazy.sock.send(request)
                except BlockingIOError:
                    other.ping()
    assert shared_world.luod.process.poll() is None


def test_ready_and_its_like_before_their_time(wire: Wire, shared_world: World) -> None:
    for cmd in ("READY", "FINISHED", "CLAIM", "ABORTED", "UNSUBSCRIBE", "PRESERVED"):
        assert code(wire, cmd=cmd, id="early") == "UNKNOWN_ID"
    assert code(wire, cmd="READY") == "OUT_OF_ORDER"
    assert wire.reply(cmd="SUBSCRIBE", id="early")["ok"] is True
    assert code(wire, cmd="READY") == "OUT_OF_ORDER"
    assert code(wire, cmd="READY", id="early") == "OUT_OF_ORDER"
    assert code(wire, cmd="PRESERVED", id="early") == "OUT_OF_ORDER"
    assert code(wire, cmd="NACK", id="early", errno="EBUSY") == "OUT_OF_ORDER"
    assert code(wire, cmd="CLAIM", id="early") == "OUT_OF_ORDER"
    assert code(wire, cmd="FINISHED", id="early") == "OUT_OF_ORDER"
    assert code(wire, cmd="RESTORED", id="early", token="0x1", step="x", ok=True) == "OUT_OF_ORDER"
    assert wire.reply(cmd="SESSION", id="early")["session"]["state"] == "new"
    wire.close()
    shared_world.wait_record("session.aborted", "early.1")


def test_a_connection_speaks_only_for_what_it_subscribed(wire: Wire, shared_world: World) -> None:
    with Puppet(shared_world) as owner:
        owner.call("SUBSCRIBE", id="spoken")
        assert code(wire, cmd="SUBSCRIBE", id="spoken") == "ALREADY_SUBSCRIBED"
        for cmd in ("READY", "PRESERVED", "UNSUBSCRIBE", "FINISHED"):
            assert code(wire, cmd=cmd, id="spoken") == "NOT_SUBSCRIBED"
        assert owner.call("SESSION", id="spoken")["session"]["state"] == "new"
    shared_world.wait_record("session.aborted", "spoken.1")


def test_admin_verbs_out_of_order(wire: Wire, shared_world: World) -> None:
    assert code(wire, cmd="KEXEC") == "NO_IMAGE"
    assert code(wire, cmd="ABORT") == "NO_UPDATE"
    assert code(wire, cmd="ABORT", id="nobody") == "UNKNOWN_ID"
    assert code(wire, cmd="RESOLVE", key="vm1.1/create", decision="done") == "NOT_IN_DOUBT"
    assert code(wire, cmd="LOAD", kernel=str(shared_world.dir / "nothing")) == "BAD_IMAGE"
    assert code(wire, cmd="LOAD", kernel=str(shared_world.dir)) == "BAD_IMAGE"


def test_hello_of_another_version(wire: Wire) -> None:
    assert code(wire, cmd="HELLO", version=0) == "BAD_VERSION"
    answer = wire.reply(cmd="HELLO", version=99, features=["freeze", "teleport"], unknown="field")
    assert (answer["version"], answer["features"]) == (1, ["freeze"])


def test_unsubscribe_is_for_good(wire: Wire, shared_world: World) -> None:
    assert wire.reply(cmd="SUBSCRIBE", id="leaver")["ok"] is True
    assert wire.reply(cmd="UNSUBSCRIBE", id="leaver")["ok"] is True
    shared_world.wait_record("session.aborted", "leaver.1")
    assert (
        wire.reply(cmd="SUBSCRIBE", id="barrier")["ok"] is True
    )  # whatever follows the abort is done by now
    assert wire.reply(cmd="SESSION", id="leaver")["session"]["id"] == "leaver.1"


def test_an_fd_that_is_no_session_is_not_adopted(wire: Wire, shared_world: World) -> None:
    assert wire.reply(cmd="SUBSCRIBE", id="adopter")["ok"] is True
    with open("/dev/null", "rb") as null:
        line = json.dumps({"cmd": "ADOPT", "id": "adopter", "seq": 77, "fds": 1}).encode() + b"\n"
        wire.send(line, [null.fileno()])
        assert wire.line()["error"]["code"] not in ("", "UNKNOWN_COMMAND")
    assert code(wire, cmd="ADOPT", id="adopter") == "BAD_FDS"
    wire.close()
    shared_world.wait_record("session.aborted", "adopter.1")


def test_many_at_once(shared_world: World) -> None:
    before = len(shared_world.luod.fds())
    wires = [Wire(shared_world.socket) for _ in range(100)]
    try:
        for number, wire in enumerate(wires):
            wire.send(b'{"cmd":"PING","seq":%d}\n' % number)
        assert [wire.line()["reply"] for wire in wires] == list(range(100))
        assert len(shared_world.luod.fds()) > before + 100
    finally:
        for wire in wires:
            wire.close()


def test_every_refusal_has_a_listed_code(wire: Wire, shared_world: World) -> None:
    codes = set()
    wire.reply(cmd="SUBSCRIBE", id="codes")
    with open("/dev/null", "rb") as null:
        line = json.dumps({"cmd": "ADOPT", "id": "codes", "seq": 77, "fds": 1}).encode() + b"\n"
        wire.send(line, [null.fileno()])
        codes.add(wire.line()["error"]["code"])
    with shared_world.client() as admin:
        garbage = shared_world.dir / "garbage"
        garbage.write_text("no kernel")
        for image in (garbage, shared_world.dir):
            with pytest.raises(ClientError) as caught:
                admin.load(image)
            codes.add(caught.value.code)
    assert codes <= set(CODES)
