# SPDX-License-Identifier: Apache-2.0
"""`LabRun`: what a run in the lab did, and where everything about it lies."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .disk import read_state_disk
from .errors import LabError, LabRunFailed
from .script import Boot
from .traces import draw, last_words

CONSOLE_LINES = 25
PANIC = re.compile(r"Kernel panic - not syncing: (.*)")

Event = dict[str, Any]


@dataclass
class LabRun:
    """The events of a run in order, and its directory.

    The directory holds `console.log`, `results.jsonl`, `script.json`, `qemu.log`, and after the run `state/`: everything
    that was on the state disk, with each boot's kernel log as `state/lab/dmesg-N.txt` and each step's output as
    `state/lab/N-STEP.out`.
    """

    directory: Path
    boots: list[Boot]
    events: list[Event] = field(default_factory=list[Event])
    ended: str = ""
    _place: tuple[int, str] = (0, "power-on")

    def take(self, event: Event) -> None:
        """Add an event as it comes in."""
        self.events.append(event)
        if event["event"] in ("boot", "begin", "leave", "end"):
            self._place = (int(event["boot"]), str(event.get("step", event["event"])))

    def finish(self) -> None:
        """Bring the state disk's files out and draw the timeline of luod's journal, if there is one.

        The image itself is kept only when something went wrong.
        """
        image = self.directory / "state.img"
        read_state_disk(image, self.state)
        draw(self.directory)
        if not self.problem():
            image.unlink()

    # -- what happened ---------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> Path:
        """The files of the state disk after the run: what the guest had in /run/state."""
        return self.directory / "state"

    def of(self, kind: str) -> list[Event]:
        """Return the events of one kind."""
        return [event for event in self.events if event["event"] == kind]

    @property
    def boots_begun(self) -> int:
        """How many boots reached the init."""
        return len(self.of("boot"))

    @property
    def failed(self) -> Event | None:
        """The first step that failed, or the init's own failure."""
        for event in self.events:
            if event["event"] == "fail" or (event["event"] == "step" and not event["ok"]):
                return event
        return None

    @property
    def console(self) -> str:
        """Everything on the console."""
        path = self.directory / "console.log"
        return path.read_text("utf-8", "replace") if path.exists() else ""

    @property
    def panic(self) -> str:
        """The message of a kernel panic, or an empty string."""
        match = PANIC.search(self.console)
        return match.group(1).strip() if match else ""

    def step(self, name: str, boot: int | None = None) -> Event:
        """Return the outcome of a step. Raises `LabRunFailed` when it was not reached."""
        for event in self.of("step"):
            if event["step"] == name and boot in (None, event["boot"]):
                return event
        raise LabRunFailed(f"step {name!r} was not reached", hint=self._files()) from None

    def kernel_log(self, boot: int) -> str:
        """Return the kernel log of one boot, as far as it got before the boot ended."""
        return (self.state / "lab" / f"dmesg-{boot}.txt").read_text("utf-8", "replace")

    def file(self, path: str) -> Path:
        """Return a file from the state disk. Raises `LabError` when it is not there."""
        found = self.state / path
        if not found.exists():
            raise LabError(f"there is no {path} on the state disk", hint=self._files())
        return found

    # -- judgement -------------------------------------------------------------------------------------------------------------

    def check(self) -> LabRun:
        """Return this run if it went as its script wants, else raise `LabRunFailed` with the place and the last lines of each file.

        What went wrong stands first and once more last, with the console before it: whoever keeps only one end of a long output
        keeps the reason.
        """
        problem = self.problem()
        if problem:
            raise LabRunFailed(
                f"{problem}\n{self._last_lines()}", hint=f"{problem.splitlines()[0]}; {self._files()}"
            )
        return self

    def problem(self) -> str:
        """Say what went wrong and where; empty when nothing did."""
        boot, step = self._place
        failed = self.failed
        if failed is not None:
            what = failed.get("message") or f"exit code {failed.get('code')}"
            took = f" after {failed['seconds']} s" if "seconds" in failed else ""
            output = str(failed.get("output", "")).rstrip()
            return f"boot {failed['boot']}, step {failed['step']!r} failed{took}: {what}" + (
                f"\n{output}" if output else ""
            )
        if self.ended == "timeout":
            return f"the time ran out in boot {boot}, step {step!r}"
        expected_panic = any(boot.expect == "panic" for boot in self.boots)
        if self.panic and not expected_panic:
            return f"kernel panic after boot {boot}, step {step!r}: {self.panic}"
        if expected_panic:
            return "" if self.panic else f"the kernel was to panic after boot {boot} and did not"
        if self.boots_begun < len(self.boots):
            return f"{self.boots_begun} of {len(self.boots)} boots came up; the last was in boot {boot}, step {step!r}"
        if not any(
            event["event"] in ("end", "cut") and event["boot"] == len(self.boots) - 1 for event in self.events
        ):
            return f"the machine stopped in boot {boot}, step {step!r}, before the end of the script"
        return ""

    def _last_lines(self) -> str:
        lines = self.console.splitlines()[-CONSOLE_LINES:]
        log = self.directory / "qemu.log"
        said = log.read_text("utf-8", "replace").strip() if log.exists() else ""
        parts = [*last_words(self.directory)]
        parts += ["--- QEMU says", said] if said else []
        parts += ["--- last lines of the console", *lines] if lines else ["--- the console is empty"]
        return "\n".join(parts)

    def _files(self) -> str:
        return f"everything about this run is in {self.directory}"
