# SPDX-License-Identifier: Apache-2.0
"""Whether a running guest can be carried over a kexec, asked before anything is done to it.

QEMU itself refuses some of what is looked for here, but late: with the guest stopped. Most of it, it does not notice at all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .errors import VmNotUpdatable
from .guest import Guest
from .portrait import Portrait, portrait, qom_property

_BUSY = frozenset({"inmigrate", "finish-migrate", "save-vm", "restore-vm", "colo"})
_BACKEND = "memory-backend-file"
_TEMPORARY = re.compile(r'/vl\.\w{6}"')  # create_tmp_file, block.c


def precheck(guest: Guest, *, devices: Sequence[str]) -> Portrait:
    """Return the portrait of a guest that can be carried over, or raise `VmNotUpdatable` with every reason why it cannot.

    `devices` are those of the portrait that was taken right after the launch.
    """
    now = portrait(guest)
    reasons = [
        *_runstate(guest, guest.runstate()),
        *(f"QEMU says: {reason}" for reason in guest.migration().get("blocked-reasons", [])),
        *_version(guest),
        *_memory(guest),
        *_passthrough(now.devices),
        *_changed(devices, now.devices),
        *_disks(guest.ask("query-block")),
    ]
    if reasons:
        raise VmNotUpdatable(guest.name, reasons, hint="the guest was not touched and goes on")
    return now


def _runstate(guest: Guest, runstate: str) -> Iterable[str]:
    if runstate in _BUSY:
        yield f"it is {runstate}: another migration of it is under way"
    elif runstate == "postmigrate" and guest.migration_status() != "completed":
        yield "it is postmigrate, and of what migration cannot be told"
    elif runstate in ("internal-error", "debug"):
        yield f"it is {runstate}"


def _version(guest: Guest) -> Iterable[str]:
    known = {str(each["capability"]) for each in guest.ask("query-migrate-capabilities")}
    if "x-ignore-shared" not in known:
        yield "this QEMU does not know the migration capability x-ignore-shared"
    schema = guest.ask("query-qmp-schema")
    if not any("cpr-reboot" in each.get("values", ()) for each in schema if each["meta-type"] == "enum"):
        yield "this QEMU does not know the migration mode cpr-reboot (it needs 8.2 or newer)"


def _memory(guest: Guest) -> Iterable[str]:
    backends: list[Mapping[str, Any]] = guest.ask("query-memdev")
    for missing in sorted(guest.ram.keys() - {str(each["id"]) for each in backends}):
        yield f"it has no memory {missing}"
    for each in backends:
        name = str(each["id"])
        path = f"/objects/{name}"
        kind = qom_property(guest, path, "type")
        if kind != _BACKEND:
            yield f"memory {name} is {kind}, whose pages QEMU copies; only {_BACKEND} stays in place"
            continue
        if not each["share"]:
            yield f"memory {name} has share=off: what the guest writes is not in the memfd"
        if qom_property(guest, path, "discard-data"):
            yield f"memory {name} has discard-data=on: QEMU destroys it when it ends"
        if name not in guest.ram:
            yield f"memory {name} is not in a memfd of ours; was it plugged in later?"
            continue
        size = guest.ram_sizes()[name]
        if size != each["size"]:
            yield f"memory {name} has {each['size']} bytes, and its memfd {size}"
        if not guest.process.maps_shared(guest.ram[name]):
            yield f"memory {name} is not mapped from its memfd (QEMU opened another file)"


def _passthrough(devices: Iterable[str]) -> Iterable[str]:
    for each in devices:
        if each.startswith("vfio-"):
            yield f"it has the passthrough device {each}, whose state this kernel cannot preserve"
        elif each.startswith("vhost-user-"):
            yield f"it has the device {each}, whose state is in another process"


def _changed(before: Sequence[str], now: Sequence[str]) -> Iterable[str]:
    """A device that came later is not on the command line, so the next QEMU would not have it."""
    new = Counter(now) - Counter(before)
    gone = Counter(before) - Counter(now)
    if new:
        yield f"devices were plugged in since it was started: {', '.join(sorted(new.elements()))}"
    if gone:
        yield f"devices were unplugged since it was started: {', '.join(sorted(gone.elements()))}"


def _disks(blocks: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for each in blocks:
        inserted = each.get("inserted")
        if not inserted or inserted["ro"]:
            continue
        name = each["device"] or each.get("qdev", "?")
        if _TEMPORARY.search(str(inserted["file"])):
            yield f"disk {name} has snapshot=on: its changes are in a file that QEMU has deleted already"
        elif inserted["cache"]["no-flush"]:
            yield f"disk {name} has cache=unsafe: what the host has not written yet is lost by a kexec"
