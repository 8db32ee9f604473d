# SPDX-License-Identifier: Apache-2.0
"""A live update of real QEMU guests on the emulated kernel: `luoctl demo --qemu`.

As `run.py`, with `luo-qemu` in place of the demo's client: the guests count and check their memory all the way, and what they say on their
serial ports must be one story. The emulated kexec kills QEMU and copies the memory; all else is as on a host.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..adapters.emulator.control import Control
from ..adapters.emulator.images import stub_image
from ..qemu import command as luo_qemu
from ..states.errors import LuodError
from ..states.table import UPDATE
from ..tinyguest import image
from . import host
from .guests import MIB, GuestReport, GuestSetting, SerialPort, qemu_command, report
from .invariants import (
    journal_is_whole,
    kernel_and_journal_agree,
    memory,
    no_effect_twice,
    no_fd_leaked,
    nothing_left_in_the_kernel,
    recovery_is_idle,
)
from .outcome import Outcome, Setting, is_volatile
from .process import Child, undisturbed
from .run import Run

PATIENCE_S = 120.0
QEMU = "qemu-system-x86_64"


class GuestRun(Run):
    """A host with guests and an operator.

    `qemus` are the binaries of the first and of the second boot. `options` gives more options for luo-qemu by the number of the guest,
    `devices` more QEMU options. `config` is luod's settings.
    """

    def __init__(
        self,
        directory: Path,
        guests: int,
        setting: GuestSetting,
        say: host.Say = lambda _: None,
        *,
        qemus: tuple[str, str] = (QEMU, QEMU),
        options: Callable[[int], list[str]] = lambda _: [],
        devices: Callable[[int], list[str]] = lambda _: [],
        config: Path | None = None,
    ) -> None:
        super().__init__(directory, Setting(sessions=guests, size=setting.mib * MIB), say)
        self.config = config
        self.guests = setting
        self.qemus = qemus
        self.options = options
        self.devices = devices
        self.reports: list[GuestReport] = []
        self.kernel_image = image.write(directory / "tinyguest")
        self.ports = [SerialPort(directory / f"vm{number}.serial", number + 1) for number in range(guests)]
        self.image = stub_image(directory / "next-kernel")

    def names(self) -> list[str]:
        """Return the names of the guests."""
        return [f"vm{number}" for number in range(self.setting.sessions)]

    # -- processes

    def _client(self, name: str, boot: int) -> Callable[[int], int]:
        number = int(name.removeprefix("vm"))
        command = qemu_command(
            self.qemus[boot - 1], self.ports[number].path, self.kernel_image, number, self.guests, *self.devices(number)
        )  # fmt: skip
        arguments = [
            "--name", name, "--socket", str(self.run_dir / "liveupdate.sock"), "--run", str(self.run_dir / name),
            "--state", str(self.dir / "guests" / name), "--kernel", "emulated", "--emulator", str(self.emulator_dir),
        ]  # fmt: skip
        if is_volatile(self.dir):
            arguments.append("--volatile")

        def work(pipe: int) -> int:
            return luo_qemu.run([*arguments, "--ready-fd", str(pipe), *self.options(number), "--", *command])

        return work

    def wrapper(self, number: int) -> Child:
        """Return the luo-qemu process of a guest."""
        return self._children[f"client/vm{number}"]

    def _ended(self, number: int) -> Callable[[], str]:
        """Return what says why a guest will not speak any more: its luo-qemu has ended."""

        def why() -> str:
            child = self.wrapper(number)
            if not child.ended():
                return ""
            return f"luo-qemu ended with {child.code}: {child.log.read_text('utf-8', 'replace')[-2000:]}"

        return why

    def until_ticking(self, number: int, ticks: int, passes: int = 0) -> SerialPort:
        """Wait until a guest has ticked so often and has been over its memory so often."""
        port = self.ports[number]
        port.until_tick(ticks, passes, PATIENCE_S, give_up=self._ended(number))
        return port

    # -- the story

    def run(self) -> Outcome:
        """Go through a whole update; `reports` tells what the guests say. Raises `LuodError`."""
        self.start_first()
        if self.order_update() == "aborted":
            raise self.failed("the update was undone")
        self.say(
            f"the guests stood still; their last ticks are {', '.join(str(last) for last, _ in self.marks())}"
        )
        self.start_second()
        self.finish_update()
        self.say("every guest runs again")
        self.judge_guests()
        self.stop_guests()
        return self.look()

    @undisturbed()
    def stop(self) -> None:
        """End every process of the run: QEMUs by a cut of the power, for they live on when their luo-qemu dies."""
        if hasattr(self, "control"):
            with contextlib.suppress(OSError), Control(self.emulator_dir, timeout=host.PATIENCE_S) as power:
                power.cold_reboot()
        super().stop()

    def order_update(self) -> str:
        """Order the update; return `kexec` when the machine is in its next boot, `aborted` when the update was undone."""
        return self._first_boot()

    def look(self) -> Outcome:
        """Gather what `problems` judges, and see that one more recovery of luod changes nothing."""
        return self._look()

    def start_first(self) -> None:
        """Boot the first kernel, and start the guests and let each tick."""
        self.start_emulator()
        self.say("the first kernel boots")
        self.start_boot()
        with self.link() as link:
            self._settle_fds(link, self.outcome.fds_before)
        self.start_clients()
        for number in range(self.setting.sessions):
            if not self.wrapper(number).line(PATIENCE_S):
                raise self.failed(f"vm{number} did not start: {self._ended(number)()}")
            self.until_ticking(number, self.guests.before)
        self.say(f"{self.setting.sessions} guests of {self.guests.mib} MiB count and check their memory")

    def marks(self) -> list[tuple[int, int]]:
        """Return the last tick and pass of each guest."""
        return [(log.last, log.passes) for log in (port.look() for port in self.ports)]

    def start_second(self) -> None:
        """Boot the second kernel, and start the same commands again."""
        self.before = self.marks()
        self.say("the second kernel boots")
        self._bury("luod", "keeper", *(child.name for child in self.clients()))
        self.start_boot()
        with self.link() as link:
            self._settle_fds(link, self.outcome.fds_before)
        self.start_clients()

    def finish_update(self) -> dict[str, Any]:
        """Wait until the update has ended; return it."""
        with self.link() as link:
            link.watch()
            while True:
                update: dict[str, Any] = link.status().fields["update"]
                if update["state"] in UPDATE.final:
                    return update
                for number in range(self.setting.sessions):
                    if why := self._ended(number)():
                        raise self.failed(f"vm{number} did not come back: {why}")
                link.next_event(host.PATIENCE_S).close()

    def judge_guests(self) -> None:
        """Let every guest go on until it has checked all of its memory, and write down what it says."""
        for number, (last, passes) in enumerate(self.before):
            self.until_ticking(number, last + 1, passes + 2)
        self.reports = [
            report(name, port.look(), last, passes, self.setting.size)
            for name, port, (last, passes) in zip(self.names(), self.ports, self.before, strict=True)
        ]
        self.outcome.bytes_verified = sum(one.bytes for one in self.reports)

    def stop_guests(self) -> None:
        """End every guest as its service manager would."""
        for child in self.clients():
            child.stop(signal.SIGTERM, patience=PATIENCE_S)

    def taking_part(self) -> list[dict[str, Any]]:
        """Return the sessions of the update; each guest has another one since, for the next."""
        update = self.outcome.update
        return [one for one in self.outcome.sessions if update and one["update"] == update["id"]]

    def problems(self) -> list[str]:
        """Return everything that is wrong with a run that was to go through."""
        outcome = self.outcome
        mine = self.taking_part()
        found = [f"{one.name}: {finding}" for one in self.reports for finding in one.findings]
        if outcome.ending != "done":
            found.append(f"the update ended as {outcome.ending}")
        found += [f"{one['id']} is {one['state']}" for one in mine if one["state"] != "finished"]
        found += [f"{one['id']}: {text}" for one in outcome.sessions for text in one["anomalies"]]
        if len(mine) != self.setting.sessions:
            found.append(f"{len(mine)} of {self.setting.sessions} guests took part")
        return [
            *found, *memory(outcome, self.setting), *kernel_and_journal_agree(outcome), *nothing_left_in_the_kernel(outcome),
            *no_effect_twice(outcome), *no_fd_leaked(outcome), *recovery_is_idle(outcome), *journal_is_whole(outcome, self.dir),
        ]  # fmt: skip


def usable(qemu: str = QEMU) -> str:
    """Return the QEMU to run guests with. Raises `LuodError` saying how to get one."""
    found = shutil.which(qemu)
    if found is None:
        raise LuodError(
            f"{qemu} is not installed", hint="`apt-get install qemu-system-x86`, version 10 or newer; .ci/install-qemu does it"
        )  # fmt: skip
    return found
