# SPDX-License-Identifier: Apache-2.0
"""The old kernel's half: preserve while the guest runs, freeze it, and let it go on when nothing came of it.

The effects of one freeze have the save's number in their keys, `vm1.1/freeze3/save`. One that an earlier process has begun is taken up
where it was: what the guest did before is in the journal, written before anything was done to it.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import anyio.to_thread
import msgspec

from ..adapters.qemu.errors import QemuError
from ..adapters.qemu.identity import NO_RECORD
from ..adapters.qemu.precheck import precheck
from ..adapters.qemu.save import Abort
from ..engine.ports import Intent, Json
from ..engine.runner import Engine
from ..states.errors import LuodError
from ..states.fold import Effect
from .effects import RECORD_TOKEN, VMSTATE_TOKEN, cpu_features, look_ahead, ram_tokens
from .plan import Plan
from .vm import RECORD, VMSTATE, Vm

FREEZE = "/freeze"
GRACE_S = 60.0
"""How long beyond the deadline of a freeze a luod that is connected may be silent, in seconds: it may be jumping."""


class Refusal(LuodError):
    """The guest cannot follow this update; it goes on. `errno` is symbolic, as NACK wants it."""

    def __init__(self, message: str, errno: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.errno = errno or "EIO"


class Frozen(msgspec.Struct, frozen=True):
    """A freeze that has begun: of which session, the save's number, what the guest did before, and until when luod is waited for.

    `by` is in seconds of CLOCK_BOOTTIME.
    """

    session: str
    generation: int
    runstate: str
    by: float

    @property
    def key(self) -> str:
        """What the keys of its effects begin with."""
        return f"{self.session}{FREEZE}{self.generation}"


def now() -> float:
    """Return the seconds since boot, suspend included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Freezer:
    """Preserves and freezes one guest."""

    def __init__(self, engine: Engine, vm: Vm, plan: Plan) -> None:
        self.engine = engine
        self.vm = vm
        self.plan = plan
        self.frozen: Frozen | None = None
        self.saved = False
        """Whether all that the next kernel needs is in the session: the guest may lose its QEMU now."""
        self._features: tuple[str, ...] | None = None
        self._leaving = False

    # -- while the guest runs

    async def preserve(self) -> list[dict[str, Any]]:
        """Put RAM and record into the session in hand; return the inventory. Raises `Refusal` for a guest that cannot be carried over."""
        vm = self.vm
        try:
            await anyio.to_thread.run_sync(lambda: precheck(vm.guest, devices=vm.devices))
            await anyio.to_thread.run_sync(look_ahead, self.plan, vm)
            await self._cpu_features()
        except LuodError as error:
            raise Refusal(error.message, getattr(error, "errno", ""), hint=error.hint) from error
        wanted = {**ram_tokens(vm.guest.ram), RECORD_TOKEN: RECORD}
        inventory: list[dict[str, Any]] = []
        for token, what in wanted.items():
            size = await self._preserve(token, what)
            retrieve = {"step": f"qemu.retrieve#{what}", "args": {"token": f"{token:#x}", "what": what}}
            inventory.append(
                {"token": f"{token:#x}", "kind": "memfd", "size": size, "label": what, "plan": [retrieve]}
            )
        return inventory

    async def _cpu_features(self) -> tuple[str, ...]:
        if self._features is None:
            self._features = await anyio.to_thread.run_sync(cpu_features, self.plan, self.vm)
        return self._features

    async def _preserve(self, token: int, what: str) -> int:
        vm = self.vm
        args: dict[str, Json] = {"token": f"{token:#x}", "what": what}
        # With the guest's name: what is preserved of another guest under this id must not be taken for this one's.
        key = f"{vm.session}/{vm.uuid[:8]}/preserve/{token:#x}/{what}"
        effect = await self._make(Intent(vm.session, key, "guest.preserve", args))
        return int(effect.result.get("size", 0))

    # -- the freeze

    async def freeze(self, deadline_s: float) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Stop the guest, save it, and preserve what was saved; return that for the inventory, and milliseconds by part.

        Raises `Refusal`; the guest may be stopped then, and `go_on` is to be called.
        """
        vm = self.vm
        if vm.session_fd < 0:
            raise Refusal("this process does not have the session", "EBADF", hint="the next update is its own again")  # fmt: skip
        frozen = self.frozen
        if frozen is None:
            try:
                runstate = await anyio.to_thread.run_sync(vm.guest.runstate)
            except QemuError as error:
                raise Refusal(error.message, error.errno, hint=error.hint) from error
            frozen = Frozen(vm.session, self.next_generation(), runstate, now() + deadline_s)
            self.frozen = frozen
        spans: dict[str, float] = {}
        args: dict[str, Json] = {"runstate": frozen.runstate}
        begun = time.monotonic()
        await self._make(self._intent("qemu.pause", {**args, "by": frozen.by}))
        begun = _lap(spans, "pause", begun)
        saved = await self._make(self._intent("qemu.save", args))
        begun = _lap(spans, "save", begun)
        record = {
            **args,
            "generation": frozen.generation,
            "saved": _kept(saved),
            "cpu_features": await self._cpu_features(),
        }
        await self._make(self._intent("guest.record", record))
        token = VMSTATE_TOKEN + frozen.generation
        size = await self._preserve(token, VMSTATE)
        _lap(spans, "preserve", begun)
        self.saved = True
        retrieve = {"token": f"{token:#x}", "what": VMSTATE}
        steps: list[dict[str, Any]] = [{"step": "qemu.retrieve", "args": retrieve}]
        steps += [{"step": step} for step in ("qemu.check", "qemu.start", "qemu.load", "qemu.resume")]
        vmstate = {
            "token": f"{token:#x}", "kind": "memfd", "size": size, "label": VMSTATE, "checksum": f"sha256:{saved.result['sha256']}",
            "plan": steps,
        }  # fmt: skip
        return [vmstate], spans

    def _intent(self, kind: str, args: dict[str, Json]) -> Intent:
        assert self.frozen is not None
        name = kind.partition(".")[2]
        return Intent(self.frozen.session, f"{self.frozen.key}/{name}", kind, args)

    async def _make(self, intent: Intent) -> Effect:
        effect = await self.engine.ensure(intent)
        if effect.status != "done":
            raise Refusal(effect.message or f"{intent.kind} failed", effect.errno)
        return effect

    def next_generation(self) -> int:
        """Return the number of the next save: one more than any that the journal or the guest's record knows."""
        known = self.vm.record.generation if self.vm.record is not None else 0
        for record in self.engine.book.streams.values():
            for effect in record.effects.values():
                if effect.kind == "qemu.pause":
                    known = max(known, generation_of(effect.key))
        return known + 1

    # -- and back

    async def go_on(self) -> None:
        """Let a frozen guest do again what it did before: in its QEMU, or if that has ended after the save, in another.

        Raises `Refusal` when it cannot.
        """
        frozen = self.frozen
        if frozen is None:
            return
        self._leaving = True
        args: dict[str, Json] = {"runstate": frozen.runstate, "generation": frozen.generation}
        if self.vm.alive() or not self.saved:
            await self._make(self._intent("qemu.abort", args))
        else:
            await anyio.to_thread.run_sync(self.vm.retrieve_from_dead)
            for kind in ("qemu.start", "qemu.load", "qemu.resume"):
                await self._make(self._intent(kind, {}))
            self.vm.drop_retrieved()
        self.frozen, self.saved, self._leaving = None, False, False

    def rescue(self) -> None:
        """Let a frozen guest go on without a journal, which cannot be written any more: it must not stay stopped for want of a disk.

        Not one that is saved and waits for the kexec: luod may be jumping. Safe from any thread.
        """
        frozen = self.frozen
        if frozen is None or (self.saved and not self._leaving):
            return
        with contextlib.suppress(OSError):
            self.vm.mark(frozen.generation, NO_RECORD)
        Abort(self.vm.guest).apply(self._intent("qemu.abort", {"runstate": frozen.runstate}))

    def take_up(self) -> None:
        """Find in the journal a freeze of this boot that an earlier process has begun and not undone."""
        for stream, record in self.engine.book.streams.items():
            for effect in record.effects.values():
                if effect.kind != "qemu.pause" or effect.boot_id != self.engine.boot_id:
                    continue
                begun = Frozen(stream, generation_of(effect.key), effect.args["runstate"], effect.args["by"])
                if record.done(f"{begun.key}/abort") or record.done(f"{begun.key}/resume"):
                    continue
                if self.frozen is None or begun.generation > self.frozen.generation:
                    self.frozen = begun


def generation_of(key: str) -> int:
    """Return the save's number out of the key of one of its effects."""
    number = key.rpartition(FREEZE)[2].partition("/")[0]
    return int(number) if number.isdigit() else 0


def _kept(saved: Effect) -> dict[str, Json]:
    return {name: saved.result[name] for name in ("bytes", "sha256", "ram", "machine", "qemu")}


def _lap(spans: dict[str, float], name: str, begun: float) -> float:
    ended = time.monotonic()
    spans[name] = round((ended - begun) * 1000, 3)
    return ended
