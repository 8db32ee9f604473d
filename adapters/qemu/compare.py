# SPDX-License-Identifier: Apache-2.0
"""Whether a new QEMU may be started on what was preserved: everything that QEMU itself would take although it is wrong.

QEMU says `completed` to the RAM of another guest, to a CPU model that the guest cannot live on, to a device too many, to flipped bits,
and to share=off, with which the next update loses everything (all were tried on 10.0.2 and 11.1.3). Other differences it does refuse,
but only when it is running, and in words that name a migration section. So all of it is compared before, in the words of a command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from . import vmstate
from .arguments import Backend, Hardware, backends, hardware
from .errors import ConfigMismatch, ForeignRam, RamMismatch
from .identity import TRAILER, read_trailer
from .probe import Capabilities, versioned
from .record import Record


class Now(msgspec.Struct, frozen=True):
    """What is about to be started.

    `argv` is the whole command line, `capabilities` are its binary's, `cpu_features` what its CPU model means on this host (for those that
    depend on it). `ram` are the memfds that were retrieved, by the id of the memory, and `vmstate` the one with the device state.
    """

    argv: tuple[str, ...]
    capabilities: Capabilities
    cpu_features: tuple[str, ...]
    ram: Mapping[str, int]
    vmstate: int


def compare(record: Record, digest: bytes, now: Now) -> None:
    """Raise unless the command line builds the machine that was saved, on the memory that was saved, with its whole device state.

    `digest` is that of the record. Raises `ConfigMismatch` with every difference of the machine, `RamMismatch` and `ForeignRam` for memory,
    `StateCorrupt` for the device state. Nothing is changed.
    """
    name = record.name
    differences = [
        *_machine(record, now.capabilities),
        *unlike(record.hardware, {one.id: one.size for one in record.ram}, now.argv[1:]),
        *_features(record, now),
    ]
    if differences:
        raise ConfigMismatch(
            f"{name} was saved on another machine: " + "; ".join(differences),
            hint="give QEMU the command line that the guest was saved with, then let the session be tried again",
        )
    _own_memory(record, digest, now.ram)
    saved = {one.id: {"size": one.size, "sample": one.sample} for one in record.ram}
    vmstate.require_own_ram(name, now.ram, saved, TRAILER)
    vmstate.require_whole_vmstate(name, now.vmstate, record.vmstate.length, record.vmstate.sha256)


def unlike(saved: Hardware, sizes: Mapping[str, int], words: Sequence[str]) -> list[str]:
    """Return how the machine that a command line builds differs from a guest's, whose memory has these sizes by id.

    Raises `NotACommandLine`.
    """
    return [*_hardware(saved, hardware(words)), *_backends(sizes, backends(words))]


def _machine(record: Record, capabilities: Capabilities) -> Iterable[str]:
    machine = record.hardware.machine
    if not versioned(machine):
        yield f"its record names the machine type {machine!r} without a version"
    elif machine not in capabilities.machines:
        yield (
            f"{capabilities.path} (version {capabilities.version}) has no machine type {machine}, with which it was saved "
            f"by QEMU {record.qemu}"
        )


def _hardware(saved: Hardware, now: Hardware) -> Iterable[str]:
    if not versioned(now.machine):
        yield f"the machine type {now.machine!r} has no version"
    elif now.machine != saved.machine:
        yield f"the machine type was {saved.machine}, and is {now.machine}"
    if now.cpu != saved.cpu:
        yield f"the CPU was {saved.cpu or 'not named'}, and is {now.cpu or 'not named'}"
    if now.accelerators != saved.accelerators:
        yield f"the accelerator was {_listed(saved.accelerators)}, and is {_listed(now.accelerators)}"
    for text in _changes("machine property", saved.properties, now.properties):
        yield text
    for text in _changes("option", saved.options, now.options):
        yield text
    if sorted(saved.options) == sorted(now.options) and saved.options != now.options:
        yield "the devices are the same, but come in another order"


def _features(record: Record, now: Now) -> Iterable[str]:
    """Name what a CPU model of the host's own no longer means. More than it meant is no harm: a running guest does not look again.

    Another version of QEMU uses other words for the same CPU; what is missing then is found in the portrait, before the load.
    """
    if record.qemu != now.capabilities.version:
        return
    there = _valued(now.cpu_features)
    less: list[str] = []
    for name, value in _valued(record.cpu_features).items():
        if name not in there:
            less.append(f"-{name}={value}" if value else f"-{name}")
        elif there[name] != value and not _grew(value, there[name]):
            less.append(f"{name} was {value} and is {there[name]}")
    if less:
        yield f"the CPU model means less here: {', '.join(less[:12])}{' ...' if len(less) > 12 else ''}"


def _valued(words: Iterable[str]) -> dict[str, str]:
    """Return the values of the words of a CPU model; a feature that is on has an empty one."""
    split = (word.partition("=") for word in words)
    return {name: value for name, _, value in split}


def _grew(saved: str, now: str) -> bool:
    """Say whether a limit of a CPU, such as its address bits or its highest CPUID leaf, is at least what it was."""
    return saved.isdecimal() and now.isdecimal() and int(now) >= int(saved)


def _backends(saved: Mapping[str, int], now: Sequence[Backend]) -> Iterable[str]:
    there = {one.id: one for one in now}
    for missing in sorted(saved.keys() - there.keys()):
        yield f"the memory {missing} is missing"
    for extra in sorted(there.keys() - saved.keys()):
        yield f"there is memory {extra} that was not"
    for one in now:
        if one.id not in saved:
            continue
        if one.size != saved[one.id]:
            yield f"the memory {one.id} had {saved[one.id]} bytes, and has {one.size}"
        if one.kind != "memory-backend-file" or not re.fullmatch(r"/proc/self/fd/\d+", one.path):
            yield f"the memory {one.id} is not opened from the memfd that was preserved"
        if not one.share:
            yield f"the memory {one.id} has share=off: what the guest writes would be lost at the next update"


def _changes(what: str, saved: Sequence[str], now: Sequence[str]) -> Iterable[str]:
    """Name what is missing and what is new; the same thing twice counts twice."""
    missing, new = list(saved), list(now)
    for each in saved:
        if each in new:
            new.remove(each)
            missing.remove(each)
    if missing:
        yield f"{what} missing: {_listed(missing)}"
    if new:
        yield f"{what} added: {_listed(new)}"


def _listed(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words) or "none"


def _own_memory(record: Record, digest: bytes, ram: Mapping[str, int]) -> None:
    """Compare the mark at the end of each memfd with the record that it was written with."""
    for one in record.ram:
        if one.id not in ram:
            raise RamMismatch(
                f"{record.name}: its memory {one.id} was not retrieved", hint="look at the session"
            )
        found = read_trailer(ram[one.id])
        if (found.uuid, found.ram) != (record.uuid, one.id):
            raise ForeignRam(
                f"{record.name}: memory {one.id} belongs to the guest {found.uuid} (memory {found.ram}), and the record is of "
                f"{record.uuid}",
                hint="do not start it: two sessions were mixed up; keep the memfds and look at `luoctl why`",
            )
        if (found.generation, found.record) != (record.generation, digest):
            raise ForeignRam(
                f"{record.name}: memory {one.id} is of save {found.generation}, and the record of save {record.generation}",
                hint="do not start it: device state and memory are not of the same instant",
            )
