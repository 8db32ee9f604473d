# SPDX-License-Identifier: Apache-2.0
"""The pure model: what only a kernel with other kinds of files, or a failing one, would show.

Every test takes the module under test as `core`, so that the mutants at the end can be held against the same tests.
"""

from __future__ import annotations

import errno
import importlib.util
import inspect
import struct
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from luod.adapters.emulator import core as real_core
from luod.adapters.emulator.board import Board
from luod.adapters.emulator.faults import Faults
from luod.adapters.emulator.handlers import (
    File,
    FileHandler,
    HandlerRegistry,
    Payload,
    Refused,
    RetrieveStatus,
    SessionView,
)
from luod.adapters.liveupdate import abi


@pytest.fixture
def core() -> ModuleType:
    return real_core


@dataclass(eq=False)
class Thing:
    """A file of the fake kind."""

    name: str
    closed: bool = False

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        assert not self.closed, f"{self.name} is closed twice"
        self.closed = True


@dataclass
class Script:
    """What the fake handler is to do, and what was asked of it."""

    log: list[str] = field(default_factory=list)
    refuse: dict[str, int] = field(default_factory=dict)
    cannot_finish: set[str] = field(default_factory=set)

    def note(self, call: str, name: str) -> None:
        self.log.append(f"{call} {name}")
        code = self.refuse.get(f"{call} {name}", 0)
        if code:
            raise Refused(code)


class ThingHandler(FileHandler):
    """A kind whose payload is the name of the thing."""

    kind = "thing"

    def __init__(self, script: Script, compatible: str = "thing-v1") -> None:
        super().__init__(compatible)
        self.script = script

    def can_preserve(self, file: File) -> bool:
        return isinstance(file, Thing)

    def preserve(self, file: File, session: SessionView, /) -> Payload:
        assert isinstance(file, Thing)
        self.script.note("preserve", file.name)
        return file.name

    def unpreserve(self, file: File, data: Payload) -> None:
        self.script.note("unpreserve", data)

    def freeze(self, file: File, data: Payload, session: SessionView) -> None:
        self.script.note("freeze", data)

    def unfreeze(self, file: File, data: Payload, /) -> None:
        self.script.note("unfreeze", data)

    def carry(self, file: File, data: Payload) -> Payload:
        return data

    def discard(self, payload: Payload) -> None:
        self.script.note("discard", payload)

    def retrieve(self, payload: Payload) -> File:
        self.script.note("retrieve", payload)
        return Thing(payload)

    def can_finish(self, payload: Payload, status: RetrieveStatus, /) -> bool:
        return payload not in self.script.cannot_finish

    def finish(self, payload: Payload, status: RetrieveStatus) -> None:
        self.script.note("finish", payload)
        super().finish(payload, status)


class DependentHandler(ThingHandler):
    """Like an iommufd: preserved only after a thing in the same session; without a way back from freeze, as VFIO."""

    kind = "dependent"
    can_unfreeze = False

    def can_preserve(self, file: File) -> bool:
        return isinstance(file, Thing) and file.name.startswith("dep")

    def preserve(self, file: File, session: SessionView, /) -> Payload:
        if not any(compatible == "thing-v1" for _, compatible, _, _ in session.preserved()):
            raise Refused(errno.EINVAL)
        return super().preserve(file, session)


class Kernel:
    """A model with short names for its calls."""

    def __init__(
        self, core: ModuleType, script: Script, records: Iterable[Any] = (), faults: Faults | None = None
    ) -> None:
        handlers = [DependentHandler(script, "dependent-v1"), ThingHandler(script)]
        self.core = core
        self.model = core.KernelModel(handlers, records, faults)
        self.model.open()

    def create(self, name: bytes) -> Any:
        return self.model.device_ioctl(abi.CREATE_SESSION, abi.pack_session(name))

    def incoming(self, name: bytes) -> Any:
        return self.model.device_ioctl(abi.RETRIEVE_SESSION, abi.pack_session(name))

    def preserve(self, session: Any, token: int, name: str) -> Thing:
        thing = Thing(name)
        self.model.session_ioctl(session, abi.PRESERVE_FD, abi.pack_fd(token), thing)
        return thing

    def retrieve(self, session: Any, token: int) -> Any:
        return self.model.session_ioctl(session, abi.RETRIEVE_FD, abi.pack_fd(token))[1]

    def finish(self, session: Any) -> None:
        self.model.session_ioctl(session, abi.FINISH, abi.pack_finish())

    def jump(self, script: Script) -> Kernel:
        self.model.serialize()
        return Kernel(self.core, script, self.model.jump())


def _code(call: Callable[..., object], *args: object) -> int:
    try:
        call(*args)
    except Refused as refusal:
        return refusal.code
    return 0


def _two_sessions(core: ModuleType, script: Script) -> tuple[Kernel, Any, Any]:
    kernel = Kernel(core, script)
    first, second = kernel.create(b"first"), kernel.create(b"second")
    kernel.preserve(second, 1, "c")  # preserved before the files of the first session, and frozen after them
    kernel.preserve(first, 2, "a")
    kernel.preserve(first, 1, "b")
    kernel.preserve(second, 2, "d")
    script.log.clear()
    return kernel, first, second


def test_freeze_in_order_of_creation_and_preservation(core: ModuleType) -> None:
    script = Script()
    kernel, _, _ = _two_sessions(core, script)
    kernel.model.serialize()
    assert script.log == ["freeze a", "freeze b", "freeze c", "freeze d"]
    assert [(s.name, [f.token for f in s.files]) for s in kernel.model.jump()] == [
        (b"first", [2, 1]),
        (b"second", [1, 2]),
    ]


def test_a_file_that_will_not_freeze_rolls_all_back(core: ModuleType) -> None:
    script = Script()
    kernel, first, second = _two_sessions(core, script)
    script.refuse["freeze d"] = errno.EINVAL
    assert _code(kernel.model.serialize) == errno.EINVAL
    assert script.log == [
        "freeze a",
        "freeze b",
        "freeze c",
        "freeze d",
        "unfreeze c",
        "unfreeze a",
        "unfreeze b",
    ]
    script.refuse.clear()
    script.log.clear()
    kernel.preserve(second, 3, "e")  # everything is usable, and may be tried again
    kernel.model.session_close(first)
    assert script.log == ["preserve e", "unpreserve b", "unpreserve a"]
    script.log.clear()
    kernel.model.serialize()
    assert script.log == ["freeze c", "freeze d", "freeze e"]


def test_a_kind_without_unfreeze_stays_frozen(core: ModuleType) -> None:
    script = Script()
    kernel = Kernel(core, script)
    session = kernel.create(b"s")
    kernel.preserve(session, 1, "thing")
    kernel.preserve(session, 2, "dep")
    kernel.preserve(session, 3, "last")
    script.log.clear()
    script.refuse["freeze last"] = errno.EBUSY
    assert _code(kernel.model.serialize) == errno.EBUSY
    assert script.log == ["freeze thing", "freeze dep", "freeze last", "unfreeze thing"]


def test_handlers_look_into_their_session(core: ModuleType) -> None:
    script = Script()
    kernel = Kernel(core, script)
    session, other = kernel.create(b"s"), kernel.create(b"other")
    kernel.preserve(other, 1, "elsewhere")
    assert _code(kernel.preserve, session, 1, "dep") == errno.EINVAL
    kernel.preserve(session, 1, "memory")
    kernel.preserve(session, 2, "dep")


def test_a_refused_preserve_leaves_nothing(core: ModuleType) -> None:
    script = Script(refuse={"preserve x": errno.ENOMEM})
    kernel = Kernel(core, script)
    session, thing = kernel.create(b"s"), Thing("x")
    call = (session, abi.PRESERVE_FD, abi.pack_fd(1), thing)
    assert _code(kernel.model.session_ioctl, *call) == errno.ENOMEM
    assert not thing.closed
    assert not session.out
    script.refuse.clear()
    kernel.model.session_ioctl(*call)


def test_closing_undoes_last_in_first_out(core: ModuleType) -> None:
    script = Script()
    kernel = Kernel(core, script)
    session = kernel.create(b"s")
    things = [kernel.preserve(session, token, name) for token, name in ((5, "a"), (1, "b"), (9, "c"))]
    script.log.clear()
    kernel.model.session_close(session)
    assert script.log == ["unpreserve c", "unpreserve b", "unpreserve a"]
    assert all(thing.closed for thing in things)


def test_a_failed_retrieve_is_for_ever(core: ModuleType) -> None:
    script = Script()
    kernel = Kernel(core, script)
    session = kernel.create(b"s")
    kernel.preserve(session, 1, "bad")
    kernel.preserve(session, 2, "good")
    kernel = kernel.jump(script)
    session = kernel.incoming(b"s")
    script.log.clear()
    script.refuse["retrieve bad"] = errno.ENODEV
    assert _code(kernel.retrieve, session, 1) == errno.ENODEV
    script.refuse.clear()
    assert _code(kernel.retrieve, session, 1) == errno.ENODEV
    assert script.log == ["retrieve bad"]  # asked once only
    assert kernel.retrieve(session, 2) is kernel.retrieve(session, 2)
    assert script.log == ["retrieve bad", "retrieve good"]
    kernel.finish(session)
    assert script.log[2:] == ["finish good", "finish bad"]


def test_finish_waits_for_every_file(core: ModuleType) -> None:
    script = Script()
    kernel = Kernel(core, script)
    session = kernel.create(b"s")
    for token, name in enumerate(("a", "b", "c")):
        kernel.preserve(session, token, name)
    kernel = kernel.jump(script)
    session = kernel.incoming(b"s")
    thing = kernel.retrieve(session, 1)
    script.log.clear()
    script.cannot_finish = {"c"}
    assert _code(kernel.finish, session) == errno.EBUSY
    assert script.log == []
    assert not thing.closed
    script.cannot_finish = set()
    kernel.finish(session)
    assert script.log == ["finish c", "discard c", "finish b", "finish a", "discard a"]
    assert thing.closed


def test_a_close_that_cannot_finish_leaks(core: ModuleType) -> None:
    script = Script(cannot_finish={"a"})
    kernel = Kernel(core, script)
    kernel.preserve(kernel.create(b"s"), 1, "a")
    kernel = kernel.jump(script)
    session = kernel.incoming(b"s")
    kernel.model.session_close(session)
    script.cannot_finish = set()
    assert _code(kernel.incoming, b"s") == errno.EINVAL
    script.log.clear()
    kernel.model.serialize()
    assert kernel.model.jump() == []
    assert script.log == ["discard a"]


def test_what_was_not_retrieved_is_dropped_at_the_next_kexec(core: ModuleType) -> None:
    script = Script()
    kernel = Kernel(core, script)
    kernel.preserve(kernel.create(b"s"), 1, "a")
    kernel = kernel.jump(script)
    script.log.clear()
    kernel = kernel.jump(script)
    assert script.log == ["discard a"]
    assert _code(kernel.incoming, b"s") == errno.ENOENT


def test_after_serialization_everything_blocks(core: ModuleType) -> None:
    script = Script()
    kernel, first, _ = _two_sessions(core, script)
    kernel.model.serialize()
    blocking: list[Callable[[], object]] = [
        lambda: kernel.create(b"new"),
        lambda: kernel.incoming(b"none"),
        lambda: kernel.preserve(first, 1, "z"),
        lambda: kernel.model.session_ioctl(first, abi.GET_NAME, abi.pack_name()),
        lambda: kernel.model.session_close(first),
    ]
    for call in blocking:
        with pytest.raises(core.Blocked):
            call()
    # what is looked at before the lock still answers
    assert _code(kernel.retrieve, first, 1) == errno.EINVAL
    assert _code(kernel.model.session_ioctl, first, abi.GET_NAME, bytes(72)) == errno.EINVAL
    assert _code(kernel.model.device_ioctl, 0xBA02, bytes(72)) == errno.EINVAL
    assert _code(kernel.create, b"") == errno.EINVAL
    kernel.model.close()
    kernel.model.open()


def test_unreadable_arguments(core: ModuleType) -> None:
    kernel = Kernel(core, Script())
    session = kernel.create(b"s")
    for request in (abi.CREATE_SESSION, 0xBB00):  # the size is read before the request is looked at
        assert _code(kernel.model.device_ioctl, request, b"\x48\0") == errno.EFAULT
    assert _code(kernel.model.device_ioctl, abi.CREATE_SESSION, struct.pack("<I", 72)) == errno.EFAULT
    assert _code(kernel.model.session_ioctl, session, abi.FINISH, b"") == errno.EFAULT
    assert _code(kernel.model.session_ioctl, session, abi.GET_NAME, struct.pack("<I", 4096)) == errno.EFAULT


def test_limits(core: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "MAX_SESSIONS", 2)
    monkeypatch.setattr(core, "MAX_FILES", 1)
    kernel = Kernel(core, Script())
    session = kernel.create(b"a")
    kernel.create(b"b")
    assert _code(kernel.create, b"c") == errno.ENOSPC
    kernel.preserve(session, 1, "x")
    assert _code(kernel.preserve, session, 1, "x") == errno.EEXIST
    assert _code(kernel.preserve, session, 2, "y") == errno.ENOSPC


def test_an_unknown_handler_breaks_the_device_for_ever(core: ModuleType) -> None:
    script = Script()
    kernel = Kernel(core, script)
    kernel.preserve(kernel.create(b"s"), 1, "a")
    kernel.model.serialize()
    model = core.KernelModel([ThingHandler(script, "thing-v2")], kernel.model.jump())
    for _ in range(3):
        assert _code(model.open) == errno.EIO
        assert not model.device_open


def test_an_empty_session_needs_no_handler(core: ModuleType) -> None:
    kernel = Kernel(core, Script())
    kernel.create(b"s")
    kernel.model.serialize()
    model = core.KernelModel([], kernel.model.jump())
    model.open()
    model.device_ioctl(abi.RETRIEVE_SESSION, abi.pack_session(b"s"))


@pytest.mark.parametrize("count", [51, 102])
def test_the_empty_block(core: ModuleType, count: int) -> None:
    kernel = Kernel(core, Script())
    sessions = [kernel.create(b"s%d" % number) for number in range(count)]
    assert not kernel.model.has_empty_block
    for _ in range(3):
        assert _code(kernel.create, b"s0") == errno.EEXIST
        assert kernel.model.has_empty_block
    kernel.model.session_close(kernel.create(b"scratch"))
    assert not kernel.model.has_empty_block
    kernel.model.session_close(sessions.pop())
    assert _code(kernel.create, b"s0") == errno.EEXIST
    assert not kernel.model.has_empty_block  # with one session less there is room in the last block
    for session in sessions:
        kernel.model.session_close(session)
    assert not kernel.model.has_empty_block


def test_faults_strike_where_they_are_told(core: ModuleType) -> None:
    faults = Faults()
    kernel = Kernel(core, Script(), faults=faults)
    faults.add("create", errno=errno.ENOMEM, session=b"one", times=2)
    assert _code(kernel.create, b"other") == 0
    assert [_code(kernel.create, b"one") for _ in range(3)] == [errno.ENOMEM, errno.ENOMEM, 0]
    faults.add("preserve", errno=errno.ENOMEM, token=7, skip=1)
    session = kernel.model.outgoing[b"one"]
    assert _code(kernel.preserve, session, 8, "a") == 0
    assert _code(kernel.preserve, session, 7, "b") == 0  # skipped
    kernel.model.session_close(session)
    session = kernel.create(b"one")
    assert _code(kernel.preserve, session, 7, "b") == errno.ENOMEM
    with pytest.raises(ValueError, match="no such point"):
        faults.add("nowhere")
    with pytest.raises(ValueError, match="wants an errno"):
        faults.add("freeze")


def test_the_registry() -> None:
    registry, script = HandlerRegistry(Board()), Script()
    registry.register("thing", "thing-v1", lambda compatible: ThingHandler(script, compatible))
    with pytest.raises(ValueError, match="registered"):
        registry.register("thing", "thing-v1", lambda compatible: ThingHandler(script, compatible))
    assert [handler.compatible for handler in registry.build({})] == ["thing-v1"]
    assert [handler.compatible for handler in registry.build({"thing": "thing-v9"})] == ["thing-v9"]
    assert registry.build({"thing": None}) == []


MUTANTS: list[tuple[str, str, str, Callable[..., None]]] = [
    (
        "failure not sticky",
        "            entry.error = refusal.code\n            raise\n",
        "            raise\n",
        test_a_failed_retrieve_is_for_ever,
    ),
    (
        "freeze without roll-back",
        "                    self._roll_back(done)\n",
        "",
        test_a_file_that_will_not_freeze_rolls_all_back,
    ),
    (
        "roll-back forwards",
        "for _, frozen in reversed(done):",
        "for _, frozen in done:",
        test_a_file_that_will_not_freeze_rolls_all_back,
    ),
    (
        "roll-back of the failing file",
        "                frozen.append(entry)\n",
        "",
        test_a_file_that_will_not_freeze_rolls_all_back,
    ),
    (
        "unfreeze always",
        "if entry.handler.can_unfreeze:",
        "if True:",
        test_a_kind_without_unfreeze_stays_frozen,
    ),
    (
        "locked after a failed freeze",
        '        code = self.faults.errno("freeze"',
        '        self.serialized = True\n        code = self.faults.errno("freeze"',
        test_a_file_that_will_not_freeze_rolls_all_back,
    ),
    (
        "FINISH in order of preservation",
        "for token in reversed(list(session.arrived)):",
        "for token in list(session.arrived):",
        test_finish_waits_for_every_file,
    ),
    (
        "FINISH does not ask",
        "if ordered or not entry.handler.can_finish(entry.payload, entry.status):",
        "if ordered:",
        test_finish_waits_for_every_file,
    ),
    (
        "undone first-in first-out",
        "for token in reversed(list(session.out)):",
        "for token in list(session.out):",
        test_closing_undoes_last_in_first_out,
    ),
    (
        "leaked session can be had again",
        "            session.leaked = True\n",
        "            session.retrieved = False\n",
        test_a_close_that_cannot_finish_leaks,
    ),
    (
        "refused object stays marked",
        "        data = handler.preserve(file, session)\n        self._objects.add(identity)\n",
        "        self._objects.add(identity)\n        data = handler.preserve(file, session)\n",
        test_a_refused_preserve_leaves_nothing,
    ),
    (
        "no lock",
        "        if self.serialized:\n            raise Blocked\n",
        "        return\n",
        test_after_serialization_everything_blocks,
    ),
    (
        "EIO once only",
        "            self._deserialize_error = self._deserialize()\n        if self._deserialize_error:\n",
        "            self._deserialize_error = 0\n            if self._deserialize():\n                raise Refused(5)\n        if 0:\n",
        test_an_unknown_handler_breaks_the_device_for_ever,
    ),
    (
        "EEXIST before the room",
        "        self._insert_room()\n        if name in self.outgoing:\n            raise Refused(errno.EEXIST)\n",
        "        if name in self.outgoing:\n            raise Refused(errno.EEXIST)\n        self._insert_room()\n",
        test_the_empty_block,
    ),
    (
        "size after the request",
        "        size = user_size(buf)\n        if request not in _DEVICE_REQUESTS:\n            raise Refused(errno.ENOTTY)\n",
        "        if request not in _DEVICE_REQUESTS:\n            raise Refused(errno.ENOTTY)\n        size = user_size(buf)\n",
        test_unreadable_arguments,
    ),
]


@pytest.mark.parametrize(("name", "old", "new", "test"), MUTANTS, ids=[mutant[0] for mutant in MUTANTS])
def test_a_wrong_model_is_noticed(name: str, old: str, new: str, test: Callable[..., None]) -> None:
    path = Path(str(real_core.__file__))
    source = path.read_text("utf-8")
    assert source.count(old) == 1
    spec = importlib.util.spec_from_file_location("luod.adapters.emulator.core_mutant", path)
    assert spec is not None
    mutant = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = mutant  # dataclasses look their module up
    try:
        exec(compile(source.replace(old, new), str(path), "exec"), mutant.__dict__)
        arguments: dict[str, object] = {"core": mutant, "count": 51}
        with pytest.raises((AssertionError, Refused, KeyError, mutant.Blocked, pytest.fail.Exception)):
            test(**{key: arguments[key] for key in inspect.signature(test).parameters})
    finally:
        del sys.modules[spec.name]
