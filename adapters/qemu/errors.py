# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with a QEMU, by name, and what its own texts mean.

    QemuError                .errno: symbolic, empty where there is none
      LaunchFailed           QEMU could not be started, or ended before it served its monitor
      NotThatQemu            a process that was to be adopted is another one than was meant
      VmmDied                QEMU has ended, or hung up
      MonitorError           the conversation with its monitor
        QmpGarbled           not QMP
        MonitorTimeout       no answer in time; whether the command was run is unknown
        CommandRefused       a QMP error: .error_class, .desc, .command
      VmNotUpdatable         this guest cannot be carried over a kexec: .reasons
      CheckpointRefused      QEMU would not begin to save; the guest is as it was
      CheckpointFailed       QEMU began to save and failed; the guest goes on if it ran before
        CheckpointTimeout    it took too long and was cancelled
      RestoreFailed          the new QEMU could not load; memory is untouched, a new QEMU may try again
        RestoreTimeout
        RamMismatch          the memory it was given is not of the right size, or cannot be opened
          ForeignRam         the memory is not the one that belongs to the saved device state
        ConfigMismatch       the new QEMU is another machine than the saved one
        StateCorrupt         the saved device state is damaged
      ResumeFailed           the guest could not be set going

QEMU says why in words only. The words were read off QEMU 10.0.2 and 11.1.3 (migration/*.c, system/physmem.c); both format them
differently, so they are found by parts.
"""

from __future__ import annotations

import errno as numbers
import os
import re
from collections.abc import Sequence

from ...states.errors import LuodError


class QemuError(LuodError):
    """Something went wrong with a QEMU process. `errno` is symbolic ("ENOSPC"), empty where there is none."""

    errno = ""

    def __init__(self, message: str, *, hint: str = "", errno: str = "") -> None:
        super().__init__(message, hint=hint)
        if errno:
            self.errno = errno


class LaunchFailed(QemuError):
    """QEMU could not be started, or ended before its monitor answered."""

    errno = "ENOEXEC"


class NotThatQemu(QemuError):
    """A process that was to be adopted is not the one that was meant."""

    errno = "ESRCH"


class VmmDied(QemuError):
    """QEMU has ended, or closed its monitor, which it does only then."""

    errno = "ESRCH"


class MonitorError(QemuError):
    """The conversation with a QEMU monitor went wrong."""


class QmpGarbled(MonitorError):
    """What came from the monitor is not QMP; nothing after it can be trusted."""

    errno = "EPROTO"


class MonitorTimeout(MonitorError):
    """QEMU did not answer in time. Whether it runs the command later is unknown."""

    errno = "ETIMEDOUT"


class CommandRefused(MonitorError):
    """QEMU answered a command with an error: its class and its description."""

    def __init__(self, command: str, error_class: str, desc: str) -> None:
        super().__init__(f"{command}: {desc}", errno=errno_in(desc))
        self.command = command
        self.error_class = error_class
        self.desc = desc


class VmNotUpdatable(QemuError):
    """This guest cannot be carried over a kexec, for each of `reasons`."""

    errno = "EOPNOTSUPP"

    def __init__(self, subject: str, reasons: Sequence[str], *, hint: str = "") -> None:
        super().__init__(f"{subject} cannot be carried over: " + "; ".join(reasons), hint=hint)
        self.reasons = tuple(reasons)


class CheckpointRefused(QemuError):
    """QEMU would not begin to save. The guest is as it was."""

    errno = "EINVAL"


class CheckpointFailed(QemuError):
    """QEMU began to save and failed. A guest that ran goes on."""

    errno = "EIO"


class CheckpointTimeout(CheckpointFailed):
    """Saving took too long and was cancelled. A guest that ran goes on."""

    errno = "ETIMEDOUT"


class RestoreFailed(QemuError):
    """A new QEMU could not load the guest. Its memory is untouched: another QEMU may try again."""

    errno = "EINVAL"


class RestoreTimeout(RestoreFailed):
    """Loading took too long."""

    errno = "ETIMEDOUT"


class RamMismatch(RestoreFailed):
    """The memory that QEMU was given is not of the right size, cannot be opened, or is empty."""


class ForeignRam(RamMismatch):
    """The memory that QEMU was given does not belong to the saved device state."""


class ConfigMismatch(RestoreFailed):
    """The new QEMU is another machine than the one that was saved."""


class StateCorrupt(RestoreFailed):
    """The saved device state is cut off, damaged, or none at all."""

    errno = "EBADMSG"


class ResumeFailed(QemuError):
    """The guest could not be set going, or stopped."""

    errno = "EIO"


_STRERRORS = sorted(
    ((os.strerror(number), name) for number, name in numbers.errorcode.items()), key=lambda row: -len(row[0])
)


def errno_in(text: str) -> str:
    """Return the name of the errno whose text QEMU put at the end of a message, or the empty text."""
    ends = [line.strip() for line in text.splitlines()]
    return next((name for said, name in _STRERRORS if any(line.endswith(": " + said) for line in ends)), "")


_RESTORE: list[tuple[re.Pattern[str], type[RestoreFailed], str]] = [
    (re.compile(words), kind, hint)
    for words, kind, hint in (
        (
            r"backing store|ftruncate",
            RamMismatch,
            "QEMU must be given the memfd the guest was saved with, writable, at the size the guest was saved with",
        ),
        (
            r"kvm-tpr-opt",
            RamMismatch,
            "the memory has not what the device state expects there: most likely it is empty or another guest's",
        ),
        (
            r"Size mismatch",
            ConfigMismatch,
            "give QEMU the memory size (-m and size=) that the guest was saved with",
        ),
        (
            r"Unknown ramblock|Unknown section or instance|Unknown savevm section"
            r"|[Ss]ection footer|Machine type received",
            ConfigMismatch,
            "start QEMU with the machine type, devices, CPUs and object ids that the guest was saved with; "
            "name a versioned machine type such as pc-q35-10.0",
        ),
        (
            r"received capability|validate capabilities|does not accept value 'cpr-reboot'",
            ConfigMismatch,
            "both QEMUs must know x-ignore-shared and cpr-reboot",
        ),
        (
            r"Not a migration stream|Input/output error|Getting RAM address failed|ret: -5\b",
            StateCorrupt,
            "the saved device state is lost; the guest's memory is intact: keep it, and start the guest anew from its disks",
        ),
    )
]


def restore_error(subject: str, text: str) -> RestoreFailed:
    """Return the error for what QEMU said when it could not load `subject`, or could not even start for it."""
    kind, hint = next(
        ((kind, hint) for words, kind, hint in _RESTORE if words.search(text)),
        (RestoreFailed, "compare the new QEMU's version and command line with those of the saved one"),
    )
    return kind(f"QEMU cannot load {subject}: {_one_line(text)}", hint=hint)


_CHECKPOINT: list[tuple[re.Pattern[str], str]] = [
    (re.compile(words), hint)
    for words, hint in (
        (
            r"non-migratable device|blocked by|Migration is disabled",
            "remove that device, or use one that QEMU can migrate",
        ),
        (r"due to previous migration", "the guest is saved already: let it go on first"),
        (
            r"fdset|matching flags",
            "this is an error in luod: the file to save into was opened in another mode",
        ),
        (r"truncate migration file", "the file to save into is frozen already; each save needs a new one"),
        (r"No space left", "free memory, or raise the memory limit of QEMU's cgroup, and try again"),
        (r"ram_save_setup", "the file to save into cannot grow: it is sealed, or preserved already"),
        (
            r"does not accept value|unknown migration protocol",
            "this QEMU is too old: cpr-reboot needs 8.2 or newer",
        ),
        (r"already.*progress|Migration is not finalized", "another migration of this guest is under way"),
        (
            r"postcopy|COLO|background-snapshot",
            "switch off the migration capabilities that exclude cpr-reboot",
        ),
    )
]


def checkpoint_refused(subject: str, refusal: CommandRefused) -> CheckpointRefused:
    """Return the error for a QMP error at `migrate` or while it was prepared."""
    return CheckpointRefused(
        f"QEMU will not save {subject}: {_one_line(refusal.desc)}",
        hint=_checkpoint_hint(refusal.desc),
        errno=refusal.errno,
    )


def checkpoint_failed(subject: str, text: str) -> CheckpointFailed:
    """Return the error for a save that QEMU began and reported as failed."""
    return CheckpointFailed(
        f"QEMU failed to save {subject}: {_one_line(text) or 'it does not say why'}",
        hint=_checkpoint_hint(text),
        errno=errno_in(text),
    )


def _checkpoint_hint(text: str) -> str:
    return next(
        (hint for words, hint in _CHECKPOINT if words.search(text)),
        "see QEMU's stderr; the guest was not changed",
    )


def _one_line(text: str) -> str:
    return " | ".join(line.strip() for line in text.splitlines() if line.strip())[:400]
