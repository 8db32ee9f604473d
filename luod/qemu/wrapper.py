# SPDX-License-Identifier: Apache-2.0
"""`Wrapper`: the life of one guest under luo-qemu, from its first start or its restore to the end of its QEMU.

    adopt a QEMU that lives -.
    CLAIM --- restore -------+--> serve luod --> QEMU ends
      '----- launch ---------'

When QEMU ends, luo-qemu ends with its code. When luo-qemu is killed, QEMU goes on, and the next luo-qemu adopts it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from ..aclient import AsyncClient
from ..adapters.qemu.errors import QemuError
from ..conversation import ClientError, ConnectionLost, Event, Timeout, Unreachable
from ..engine.ports import Intent
from ..engine.runner import Engine
from ..states.errors import LuodError
from ..states.events import Policy
from ..states.fold import Effect
from .freezing import GRACE_S, Freezer, Refusal, now
from .plan import Plan
from .restoring import Restorer
from .vm import Vm

FAREWELL_S = 5.0
"""How long luod may take to hear that QEMU has ended, in seconds."""
WORDS_S = 0.5
"""How often what QEMU writes to its stderr is passed on, in seconds."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def to_stderr(text: str) -> None:
    """Say something to whoever reads the log."""
    print(f"luo-qemu: {text}", file=sys.stderr, flush=True)


class Wrapper:
    """One guest and its conversation with luod."""

    def __init__(
        self,
        engine: Engine,
        vm: Vm,
        plan: Plan,
        socket: Path,
        *,
        policy: Policy = "required",
        order: int = 0,
        deadline_s: float | None = None,
        ready: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = to_stderr,
    ) -> None:
        self.engine = engine
        self.vm = vm
        self.plan = plan
        self.freezer = Freezer(engine, vm, plan)
        self.restorer = Restorer(engine, vm)
        self._socket = socket
        self._subscription: dict[str, Any] = {"policy": policy, "order": order, "deadline_s": deadline_s}
        self._ready = ready
        self._say = say
        self._link: AsyncClient | None = None
        self._stopping = False
        self._alone = False
        self._heard = 0
        self._restarted = anyio.Event()

    async def run(self) -> int:
        """Live; return the exit code of QEMU. Raises `LuodError` for what a person must see."""
        with anyio.open_signal_receiver(*_SIGNALS) as signals:
            async with anyio.create_task_group() as group:
                group.start_soon(self._pass_on, signals, group.cancel_scope)
                group.start_soon(self._relay)
                try:
                    await self._begin()
                    self._ready()
                    group.start_soon(self._serve)
                    await self._until_qemu_ends()
                finally:
                    with anyio.CancelScope(shield=True):
                        await self._farewell()
                    group.cancel_scope.cancel()
        if self.vm.process is None:
            return 128 + signal.SIGTERM
        return self._code()

    # -- the beginning

    async def _begin(self) -> None:
        """Have a guest that runs and a connection that speaks for it."""
        adopted = await anyio.to_thread.run_sync(self.vm.adopt)
        if adopted:
            self._say(f"adopted QEMU {self.vm.guest.process.pid} of {self.vm.name}")
            self.freezer.take_up()
            record = self.engine.book.streams.get(self.vm.name)
            if record is not None and record.doubts():
                await self._make_launch()
        while True:
            try:
                await self._connect()
                link = self._linked()
                claimed = await self.restorer.claim(link)
                if not isinstance(claimed, str):
                    self._say(f"restoring {self.vm.name} from session {claimed['session']}")
                    await self.restorer.restore(link, claimed)
                    self._say(f"{self.vm.name} is back, {self.vm.guest.runstate()}")
                    if self.vm.changes:
                        self._say(
                            f"{self.vm.name} is as it was saved; what has changed counts when it is started anew: "
                            + "; ".join(self.vm.changes)
                        )
                elif claimed == "LOST":
                    self._say(
                        f"THE GUEST {self.vm.name} IS LOST: the kernel no longer holds its session; it starts cold"
                    )
                reply = await self._subscribe()
                if not self.vm.alive() and reply["state"] != "new":
                    await self._undo_left_over()
                    continue
                if not self.vm.alive():
                    await self._launch()
                await self._compare_notes(reply)
                return
            except (ConnectionLost, Timeout):
                self._hang_up()

    async def _launch(self) -> None:
        vm = self.vm
        for note in (await anyio.to_thread.run_sync(self.plan.adapted)).notes:
            self._say(note)
        launched = await self._make_launch()
        if launched.status != "done":
            raise QemuError(f"{vm.name} cannot be started: {launched.message}", errno=launched.errno)

    async def _make_launch(self) -> Effect:
        """Launch the guest, or if an earlier process died over it, see what came of that."""
        name = self.vm.name
        record = self.engine.book.streams.get(name)
        number = len(record.effects) if record is not None else 0
        if record is None or not record.doubts():
            number += 1
        args = {"command": self.plan.command}
        return await self.engine.ensure(Intent(name, f"{name}/{number}/launch", "qemu.launch", args))

    async def _undo_left_over(self) -> None:
        """Undo a session of this boot whose guest has died together with an earlier luo-qemu: its memory is nobody's."""
        link = self._linked()
        self._say(
            f"{self.vm.name} had a session, and its QEMU is gone: the session is undone, the guest starts cold"
        )
        await link.unsubscribe(self.vm.name)
        with await link.next_event(names=["ABORT"]):
            await link.aborted(self.vm.name)
        self._hang_up()

    # -- luod

    async def _connect(self) -> None:
        """Connect, for as long as it takes."""
        told = False
        while self._link is None:
            try:
                link = await AsyncClient.connect(self._socket, retry_until=time.monotonic() + 1.0)
            except Unreachable as error:
                if error.why == "invalid":
                    raise
                if not told:
                    self._say(f"waiting for luod: {error.message}")
                    told = True
                continue
            try:
                await link.hello(["freeze", "inventory"])
            except (ConnectionLost, Timeout):
                link.close()
            except BaseException:
                link.close()
                raise
            else:
                self._link = link

    def _linked(self) -> AsyncClient:
        if self._link is None:
            raise ConnectionLost("luod is away")
        return self._link

    def _hang_up(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    async def _subscribe(self) -> dict[str, Any]:
        reply = await self._linked().subscribe(self.vm.name, **self._subscription)
        return dict(reply.fields)

    async def _compare_notes(self, reply: dict[str, Any]) -> None:
        """See what became of our session while we could not hear of it."""
        session, state, frozen = str(reply["session"]), reply["state"], self.freezer.frozen
        if frozen is not None and frozen.session != session:
            self._say(f"session {frozen.session} was undone")
            await self._go_on()
        elif frozen is not None and state == "ready":
            self.freezer.saved = True
        if self.vm.session not in ("", session):
            self.vm.hold("", -1)
        if self._alone:
            self._alone = False
            self._say("luod is back: the guest went on by itself, what was saved is stale")
            if state == "ready":
                await self._nack(
                    "ETIMEDOUT", "luod was away beyond the deadline of the freeze: the guest has gone on"
                )

    async def _serve(self) -> None:
        """Follow luod until QEMU ends."""
        while True:
            try:
                while True:
                    with await self._next() as event:
                        await self._handle(event)
            except (ConnectionLost, Timeout):
                self._hang_up()
                await self._reconnect()

    async def _next(self) -> Event:
        """Wait for an event; when a frozen guest has waited for too long, let it go on."""
        while True:
            frozen = self.freezer.frozen
            patience = None if frozen is None else max(0.0, frozen.by + GRACE_S - now())
            try:
                return await self._linked().next_event(patience)
            except Timeout:
                await self._nack("ETIMEDOUT", "luod said nothing beyond the deadline of the freeze")
                self._say("luod says nothing beyond the deadline of the freeze: the guest goes on")
                await self._go_on()

    async def _reconnect(self) -> None:
        while self._link is None:
            frozen = self.freezer.frozen
            with anyio.CancelScope() as scope:
                if frozen is not None:
                    scope.deadline = anyio.current_time() + max(0.0, frozen.by - now())
                await self._connect()
            if self._link is None:
                self._say("luod did not come back before the deadline of the freeze: the guest goes on")
                self._alone = True
                await self._go_on()
                continue
            try:
                await self._compare_notes(await self._subscribe())
            except (ConnectionLost, Timeout):
                self._hang_up()

    async def _handle(self, event: Event) -> None:
        match event.name:
            case "START_PRESERVATION":
                self.vm.hold(str(event["session"]), event.take_fd())
                await self._follow(self._preserve)
            case "FREEZE":
                deadline = float(event["deadline_s"])
                await self._follow(lambda: self._freeze(deadline))
            case "RESUME":
                await self._go_on()
            case "ABORT":
                await self._go_on()
                self.vm.hold("", -1)
                await self._linked().aborted(self.vm.name)
            case "ERROR":
                self._say(f"luod says: {event.fields.get('error')}")
            case _:
                pass

    async def _follow(self, step: Callable[[], Any]) -> None:
        try:
            await step()
        except Refusal as error:
            self._say(f"{self.vm.name} does not take part in this update: {error}")
            await self._nack(error.errno, error.message)
            if self.vm.alive():
                await self._go_on()
        except ClientError as error:
            if error.code != "OUT_OF_ORDER":  # it was undone, or said already, in the meantime
                raise

    async def _preserve(self) -> None:
        inventory = await self.freezer.preserve()
        await self._linked().preserved(self.vm.name, inventory)

    async def _freeze(self, deadline_s: float) -> None:
        resources, spans = await self.freezer.freeze(deadline_s)
        await self._linked().ready(self.vm.name, resources, spans)

    async def _nack(self, errno: str, message: str) -> None:
        with contextlib.suppress(ClientError):
            await self._linked().nack(self.vm.name, errno, message[:4000])

    async def _go_on(self) -> None:
        if self.freezer.frozen is None:
            return
        try:
            await self.freezer.go_on()
        except Refusal as error:
            self._say(f"{self.vm.name} CANNOT GO ON: {error}")
        finally:
            self._restarted.set()

    # -- QEMU

    async def _until_qemu_ends(self) -> None:
        while True:
            self._restarted = anyio.Event()
            process = self.vm.process
            assert process is not None
            await anyio.wait_readable(process)
            process.wait(0)
            if not self.freezer.saved or self._stopping:
                return
            self._say("QEMU has ended after the save: the guest is in its session, and comes back from there")
            await self._restarted.wait()
            if not self.vm.alive():
                return
            self._heard = 0

    async def _pass_on(self, signals: Any, scope: anyio.CancelScope) -> None:
        async for number in signals:
            self._stopping = True
            process = self.vm.process
            if process is None:
                scope.cancel()
                return
            self._say(f"passing {signal.Signals(number).name} on to QEMU")
            process.signal(signal.Signals(number))

    async def _relay(self) -> None:
        """Pass on what QEMU writes to its stderr, which it has into a memfd so that it can be read after its end."""
        while True:
            await anyio.sleep(WORDS_S)
            self._pass_words()

    def _pass_words(self) -> None:
        process = self.vm.process
        if process is None:
            return
        while words := process.new_words(self._heard):
            self._heard += len(words)
            with contextlib.suppress(OSError):
                os.write(2, words)

    async def _farewell(self) -> None:
        """Tell luod that the guest has ended, unless it is saved: then the next kernel brings it back."""
        self._pass_words()
        try:
            if self._link is not None and not self.vm.alive() and not self.freezer.saved:
                with anyio.move_on_after(FAREWELL_S), contextlib.suppress(LuodError):
                    if self.vm.session:
                        await self._nack("ESRCH", f"the QEMU of {self.vm.name} has ended")
                    self.vm.hold("", -1)
                    await self._link.unsubscribe(self.vm.name)
        finally:
            self._hang_up()

    def _code(self) -> int:
        process = self.vm.process
        assert process is not None
        status = process.status
        if status is None:
            return 0
        return status if status >= 0 else 128 - status
