# SPDX-License-Identifier: Apache-2.0
"""The emulated machine over its boots: which kernel runs, what is loaded, and the record of all that was done to it."""

from __future__ import annotations

import errno
import uuid
from typing import Any

from ..liveupdate import abi
from .board import Board
from .boot import Booted, Handover, KernelPanic, boot
from .core import Incoming, KernelModel, Outgoing, Session
from .faults import Faults
from .handlers import HandlerRegistry, Refused
from .images import KernelImage, Loaded
from .memfd_files import MemfdHandler


def text(name: bytes) -> str:
    """Write a session name for JSON; bytes that are no UTF-8 are escaped."""
    return name.decode("utf-8", "backslashreplace")


class Machine:
    """One machine. `panic` is set while it stands still after a kernel panic; only a cold boot helps then."""

    def __init__(self, image: KernelImage, cmdline: str, registry: HandlerRegistry | None = None) -> None:
        self.registry = registry or HandlerRegistry(Board())
        self.board = self.registry.board
        self.deviations: list[str] = []
        self.registry.register(
            MemfdHandler.kind,
            abi.MEMFD_COMPATIBLE,
            lambda compatible: MemfdHandler(compatible, self.deviations.append),
        )
        self.faults = Faults()
        self.calls: list[dict[str, Any]] = []
        self.loaded: Loaded | None = None
        self.boots = 0
        self.boot_id = ""
        self.panic = ""
        self._first = (image, cmdline)
        self._booted: Booted | None = None
        self.cold_boot()

    @property
    def model(self) -> KernelModel | None:
        """The running kernel's live-update orchestrator, if it has one."""
        return self._booted.model if self._booted else None

    @property
    def frozen(self) -> bool:
        """Whether the sessions are serialized and only the jump can follow."""
        return self.model is not None and self.model.serialized

    def record(
        self,
        op: str,
        pid: int,
        *,
        session: bytes | None = None,
        token: int | None = None,
        file: str | None = None,
        argument: dict[str, int] | None = None,
    ) -> None:
        """Write down a call that changed the world; `file` and `argument` are those of a call on a device file."""
        call: dict[str, Any] = {"n": len(self.calls) + 1, "boot": self.boots, "op": op, "pid": pid}
        call["session"] = None if session is None else text(session)
        call["token"] = None if token is None else f"{token:#x}"
        if file is not None:
            call["file"], call["argument"] = file, argument or {}
        self.calls.append(call)

    def serialize(self, pid: int) -> None:
        """First half of reboot(KEXEC): `Refused` when no image is loaded or a file does not freeze."""
        code = self.faults.errno("reboot")
        if code:
            raise Refused(code)
        if self.loaded is None:
            raise Refused(errno.EINVAL)
        if self.model is not None:
            self.model.serialize()
        self.record("REBOOT_KEXEC", pid)

    def jump(self) -> None:
        """Second half: leave this kernel for the loaded one. No process of the old world may be alive any more."""
        loaded = self.loaded
        if loaded is None or self._booted is None:
            raise RuntimeError("jump without a loaded image")
        handover = self._hand_over(self._booted)
        self._start(loaded.image, loaded.cmdline, handover if loaded.handover else None)

    @staticmethod
    def _hand_over(booted: Booted) -> Handover | None:
        if not booted.image.kho_enabled(booted.cmdline):
            return None
        if booted.model is None:
            return Handover(booted.image.kho, None)
        empty_block = booted.model.has_empty_block
        return Handover(booted.image.kho, booted.image.luo, tuple(booted.model.jump()), empty_block)

    def cold_boot(self, image: KernelImage | None = None, cmdline: str | None = None) -> None:
        """Boot with empty memory."""
        if self.model is not None:
            self.model.power_off()
        self._start(image or self._first[0], self._first[1] if cmdline is None else cmdline, None)

    def _start(self, image: KernelImage, cmdline: str, handover: Handover | None) -> None:
        self.loaded = None
        self.boots += 1
        self.boot_id = str(uuid.uuid4())
        self.panic = ""
        self.board.boot()
        try:
            self._booted = boot(image, cmdline, self.registry, handover, self.faults)
        except KernelPanic as panic:
            self._booted = None
            if _reboots_on_panic(cmdline):
                # The firmware starts the first kernel again.
                self.cold_boot()
                return
            self.panic = str(panic)

    def state(self) -> dict[str, Any]:
        """Describe the machine."""
        booted, model = self._booted, self.model
        return {
            "boot": self.boots,
            "boot_id": self.boot_id,
            "panic": self.panic,
            "release": booted.image.release if booted else "",
            "cmdline": booted.cmdline if booted else "",
            "notes": list(booted.notes) if booted else [],
            "liveupdate": model is not None,
            "loaded": self.loaded is not None,
            "frozen": self.frozen,
            "outgoing": [_session(session) for session in model.outgoing.values()] if model else [],
            "incoming": [_session(session) for session in model.incoming.values()] if model else [],
            "devices": self.board.state(),
            "deviations": list(self.deviations),
        }


def _reboots_on_panic(cmdline: str) -> bool:
    values = [word.partition("=")[2] for word in cmdline.split() if word.startswith("panic=")]
    return bool(values) and values[-1].lstrip("-").isdigit() and int(values[-1]) != 0


def _session(session: Session) -> dict[str, Any]:
    files: list[dict[str, Any]] = []
    entries: list[Outgoing | Incoming] = [*session.out.values(), *session.arrived.values()]
    for entry in entries:
        facts: dict[str, Any] = {"token": f"{entry.token:#x}", "kind": entry.handler.kind}
        if isinstance(entry, Outgoing):
            facts.update(entry.handler.inspect(entry.data))
        else:
            facts["status"] = entry.status
            facts.update(entry.handler.inspect(entry.payload))
        files.append(facts)
    state = (
        "leaked"
        if session.leaked
        else "retrieved"
        if session.retrieved
        else "incoming"
        if session.incoming
        else "outgoing"
    )
    return {"name": text(session.name), "state": state, "files": files}
