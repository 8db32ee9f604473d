# SPDX-License-Identifier: Apache-2.0
"""Everything that luo-qemu does to the world, as effects: each can be asked whether it happened, whoever has died in between.

qemu.launch                    a guest begins, on new memory
guest.preserve                 PRESERVE_FD of RAM, of the record, of the device state
qemu.pause, qemu.save          the freeze; guest.record binds what was saved to its memory
qemu.abort                     the guest goes on in its QEMU: first its memory is marked as no longer what was saved
qemu.retrieve                  RETRIEVE_FD
qemu.check                     is it what was saved, and the machine the same? Nothing is started before that is known
qemu.start, qemu.load, qemu.resume
session.finish                 FINISH: the memory is the guest's own again
"""

from __future__ import annotations

import os
import time
import uuid as uuids
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
from msgspec.structs import replace

from ..adapters.liveupdate.errors import ObjectBusy
from ..adapters.qemu import operations as ops
from ..adapters.qemu import record as records
from ..adapters.qemu import vmstate
from ..adapters.qemu.arguments import hardware, running
from ..adapters.qemu.compare import Now, compare
from ..adapters.qemu.errors import QemuError
from ..adapters.qemu.guest import LIVE, Guest
from ..adapters.qemu.identity import NO_RECORD, Trailer, make_ram
from ..adapters.qemu.load import Load
from ..adapters.qemu.operation import Operation
from ..adapters.qemu.portrait import Portrait
from ..adapters.qemu.probe import features
from ..adapters.qemu.record import Record, SavedRam, SavedState
from ..adapters.qemu.save import Abort, Save
from ..engine.ports import Absent, Done, Effect, Intent, Json, Probe
from ..states.names import parse_token
from .plan import Plan
from .vm import RECORD, VMSTATE, Vm

LET_GO_S = 5.0
"""How long a file may still be another session's, in seconds."""
_LOOK_S = 0.02
RAM_TOKEN = 0x100
RECORD_TOKEN = 0x10
VMSTATE_TOKEN = 0x1000
"""Token of the device state of save 0; each save of a guest has its own, because a preserved token cannot be replaced."""


def look_ahead(plan: Plan, vm: Vm) -> None:
    """See that the QEMU which will start a running guest again is there and can: it may have been replaced since.

    Its answers are kept, so that they need not be asked for while the guest stands still. Raises as `Plan.returning`.
    """
    plan.returning(running(vm.argv()))


def cpu_features(plan: Plan, vm: Vm) -> tuple[str, ...]:
    """Return what the CPU model of a running guest means on this host; empty where it means the same everywhere."""
    seen = hardware(vm.argv()[1:])
    capabilities = plan.capabilities()
    if seen.cpu_model not in capabilities.fragile_cpus:
        return ()
    return features(Path(capabilities.path), seen.accelerators, seen.cpu_model)


class _OnVm:
    """Base of effects on one guest. None outlives the boot."""

    repeatable = True
    carried = False

    def __init__(self, vm: Vm, plan: Plan) -> None:
        self.vm = vm
        self.plan = plan


class Launch(_OnVm):
    """A new guest: memfds for its RAM and its record, and a QEMU on them. Result: what names it."""

    repeatable = False

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Start it. Raises `NotAdaptable`, `QemuUnusable`, `LaunchFailed` and others of QEMU."""
        vm, adapted = self.vm, self.plan.adapted()
        vm.uuid = str(uuids.uuid4())
        ram: dict[str, int] = {}
        try:
            for one in adapted.ram:
                ram[one.id] = make_ram(Trailer(vm.uuid, one.id), one.size)
            record_fd = records.make_memfd()
        except BaseException:
            for fd in ram.values():
                os.close(fd)
            raise
        vm.start(adapted.argv(ram, vm.monitor_path), ram, record_fd, None)
        return _launched(vm)

    def probe(self, intent: Intent) -> Probe:
        """Look for a QEMU of this guest."""
        return Done(_launched(self.vm)) if self.vm.adopt() else Absent()


def _launched(vm: Vm) -> dict[str, Json]:
    process = vm.guest.process
    return {
        "pid": process.pid, "started": process.identity.started, "uuid": vm.uuid, "devices": list(vm.devices),
        "qemu": vm.guest.monitor.greeting.version, "argv": vm.argv(),
    }  # fmt: skip


class Preserve(_OnVm):
    """PRESERVE_FD. Arguments: `token`, and `what`: the id of RAM, `record` or `vmstate`."""

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Preserve it. Raises `KernelError`."""
        vm, what = self.vm, str(intent.args["what"])
        guest = vm.guest
        fd = (
            _copy(guest.vmstate)
            if what == VMSTATE
            else os.dup(vm.record_fd if what == RECORD else guest.ram[what])
        )
        try:
            self._preserve(parse_token(intent.args["token"]), fd)
            return {"size": os.fstat(fd).st_size}
        finally:
            os.close(fd)

    def _preserve(self, token: int, fd: int) -> None:
        """A session that was undone a moment ago lets go of its files when the last of its holders has closed it: not at once."""
        until = time.monotonic() + LET_GO_S
        while True:
            try:
                self.vm.kernel.preserve_fd(self.vm.session_fd, token, fd)
                return
            except ObjectBusy:
                if time.monotonic() > until:
                    raise
                time.sleep(_LOOK_S)

    def probe(self, intent: Intent) -> Probe:
        """Ask the session."""
        taken = self.vm.kernel.token_preserved(self.vm.session_fd, parse_token(intent.args["token"]))
        return Done() if taken else Absent()


def _copy(fd: int | None) -> int:
    """Copy device state: QEMU keeps its own for a guest that stays stopped after an abort, and one file is preserved once only."""
    if fd is None:
        raise QemuError("there is no saved state to preserve", hint="save the guest first")
    copy = vmstate.make_vmstate()
    try:
        size = os.fstat(fd).st_size
        os.ftruncate(copy, size)
        done = 0
        while done < size:
            done += os.pwrite(copy, os.pread(fd, 1 << 20, done), done)
    except BaseException:
        os.close(copy)
        raise
    return copy


class WriteRecord(_OnVm):
    """The record of a saved guest, and the marks of its RAM. Arguments: `generation`, `runstate`, `saved` (of `Save`), `cpu_features`."""

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Write both. Raises `ConfigMismatch` for a guest that no record can hold."""
        vm, args = self.vm, intent.args
        saved, generation = args["saved"], int(args["generation"])
        was = running(vm.argv())
        extra = {one.id: one.extra for one in was.ram}
        vm.record = Record(
            name=vm.name,
            uuid=vm.uuid,
            generation=generation,
            binary=was.binary,
            qemu=saved["qemu"],
            words=was.words,
            hardware=was.hardware,
            cpu_features=tuple(args["cpu_features"]),
            portrait=msgspec.convert(saved["machine"], Portrait),
            ram=tuple(
                SavedRam(
                    f"{token:#x}", name, saved["ram"][name]["size"], saved["ram"][name]["sample"], extra[name]
                )
                for token, name in ram_tokens(vm.guest.ram).items()
            ),
            vmstate=SavedState(f"{VMSTATE_TOKEN + generation:#x}", int(saved["bytes"]), saved["sha256"]),
            runstate=args["runstate"],
        )
        vm.digest = records.write(vm.record_fd, vm.record)
        vm.mark(generation, vm.digest)
        return {"digest": vm.digest.hex()}

    def probe(self, intent: Intent) -> Probe:
        """Never believed: writing the same once more costs nothing."""
        return Absent()


def ram_tokens(ram: Mapping[str, int]) -> dict[int, str]:
    """Return the token of each piece of RAM."""
    return {RAM_TOKEN + number: name for number, name in enumerate(sorted(ram))}


class OfGuest(_OnVm):
    """An operation of `adapters/qemu` on whatever QEMU the guest has now."""

    def __init__(self, vm: Vm, plan: Plan, operation: Callable[[Guest], Operation]) -> None:
        super().__init__(vm, plan)
        self._operation = operation

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Do it."""
        return self._operation(self.vm.guest).apply(self._full(intent))

    def probe(self, intent: Intent) -> Probe:
        """Ask QEMU."""
        return self._operation(self.vm.guest).probe(self._full(intent)) if self.vm.alive() else Absent()

    def _full(self, intent: Intent) -> Intent:
        """Add to a step of a restore plan what only the record knows."""
        if "runstate" in intent.args:
            return intent
        record = self.vm.record
        if record is None:
            raise QemuError(f"{intent.key}: the record was not read", hint="run qemu.check first")
        saved = {one.id: {"size": one.size, "sample": one.sample} for one in record.ram}
        return replace(
            intent,
            args={
                "runstate": record.runstate, "bytes": record.vmstate.length, "sha256": record.vmstate.sha256, "ram": saved,
                "machine": msgspec.to_builtins(record.portrait),
            },
        )  # fmt: skip


class GoOn(OfGuest):
    """`Abort`, after the memory was marked: from here on it is not what was saved. Arguments: `runstate`, `generation`."""

    def __init__(self, vm: Vm, plan: Plan) -> None:
        super().__init__(vm, plan, Abort)

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Mark the memory and let the guest go on."""
        self.vm.mark(int(intent.args["generation"]), NO_RECORD)
        return super().apply(intent)


class Retrieve(_OnVm):
    """RETRIEVE_FD. Arguments: `token`, and `what` it is."""

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Retrieve it. Raises `KernelError`."""
        fd = self.vm.kernel.retrieve_fd(self.vm.session_fd, parse_token(intent.args["token"]))
        size = os.fstat(fd).st_size
        self.vm.keep(str(intent.args["what"]), fd)
        return {"size": size}

    def probe(self, intent: Intent) -> Probe:
        """Look whether this process has it: fds end with their process."""
        return Done() if self.vm.has(str(intent.args["what"])) else Absent()


class Check(_OnVm):
    """Compare the record, the memory, the device state and the command line. Starts nothing."""

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Compare. Raises `QemuError`s that say what differs, `QemuUnusable` for a binary that cannot be used."""
        vm = self.vm
        record, digest = records.read(vm.retrieved[RECORD])
        capabilities = self.plan.capabilities()
        ram = _ram(vm)
        back = self.plan.returning(record.command())
        argv = back.adapted.argv({one.id: 0 for one in back.adapted.ram}, vm.monitor_path, incoming=True)
        now_features: tuple[str, ...] = ()
        if record.cpu_features:
            seen = hardware(argv[1:])
            now_features = features(Path(capabilities.path), seen.accelerators, seen.cpu_model)
        compare(record, digest, Now(tuple(argv), capabilities, now_features, ram, vm.retrieved[VMSTATE]))
        vm.record, vm.digest, vm.uuid = record, digest, record.uuid
        return {
            "uuid": record.uuid, "generation": record.generation, "machine": record.hardware.machine, "saved_by": record.qemu,
            "qemu": capabilities.version, "runstate": record.runstate, "changes": list(back.changes),
        }  # fmt: skip

    def probe(self, intent: Intent) -> Probe:
        """A guest that runs has been checked, and has changed since."""
        if not self.vm.alive():
            return Absent()
        if self.vm.record is None:
            self.vm.record, self.vm.digest = records.read(self.vm.record_fd)
        return Done()


def _ram(vm: Vm) -> dict[str, int]:
    return {name: fd for name, fd in vm.retrieved.items() if name not in (RECORD, VMSTATE)}


class Start(_OnVm):
    """A QEMU on the memory that was retrieved, waiting for the guest to come in."""

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Start it. Raises `LaunchFailed`, `RamMismatch`; no QEMU is left running then."""
        vm, record = self.vm, self.vm.record
        if record is None:
            raise QemuError(f"{intent.key}: the record was not read", hint="run qemu.check first")
        # Copies: if this QEMU fails, another can be started on what was retrieved.
        ram = {name: os.dup(fd) for name, fd in _ram(vm).items()}
        record_fd, state = os.dup(vm.retrieved[RECORD]), os.dup(vm.retrieved[VMSTATE])
        back = self.plan.returning(record.command())
        vm.start(back.adapted.argv(ram, vm.monitor_path, incoming=True), ram, record_fd, state)
        vm.changes = back.changes
        return _launched(vm)

    def probe(self, intent: Intent) -> Probe:
        """Look for the QEMU."""
        return Done(_launched(self.vm)) if self.vm.alive() else Absent()


class Resume(OfGuest):
    """`cont`, if the guest ran before. What the session gave is let go: QEMU has it."""

    def __init__(self, vm: Vm, plan: Plan) -> None:
        super().__init__(vm, plan, ops.Resume)

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Let the guest go on. Its memory is marked before: once it may have run, no other QEMU is started on what was saved."""
        record = self.vm.record
        if record is not None and record.runstate in LIVE:
            self.vm.mark(record.generation, NO_RECORD)
        return super().apply(intent)


class Finish(_OnVm):
    """FINISH on the session. Once more has no effect (liveupdate.h)."""

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Finish it. Raises `KernelError`."""
        self.vm.kernel.finish(self.vm.session_fd)
        return {}

    def probe(self, intent: Intent) -> Probe:
        """The session cannot be asked; finishing once more is harmless."""
        return Absent()


def effects(vm: Vm, plan: Plan) -> dict[str, Effect]:
    """Return every effect of luo-qemu by its kind."""
    return {
        "qemu.launch": Launch(vm, plan),
        "guest.preserve": Preserve(vm, plan),
        "guest.record": WriteRecord(vm, plan),
        "qemu.pause": OfGuest(vm, plan, ops.Pause),
        "qemu.save": OfGuest(vm, plan, Save),
        "qemu.abort": GoOn(vm, plan),
        "qemu.retrieve": Retrieve(vm, plan),
        "qemu.check": Check(vm, plan),
        "qemu.start": Start(vm, plan),
        "qemu.load": OfGuest(vm, plan, Load),
        "qemu.resume": Resume(vm, plan),
        "session.finish": Finish(vm, plan),
    }
