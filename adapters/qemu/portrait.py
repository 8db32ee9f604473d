# SPDX-License-Identifier: Apache-2.0
"""`Portrait`: a guest's machine as QEMU describes it, and how two of them differ.

QEMU loads a guest into a machine with another CPU model or one device more without a word; the guest then is dead, or finds hardware
that it has never seen. So the machine is described when it is saved and compared before anything is loaded.
"""

from __future__ import annotations

from typing import Any

import msgspec

from .errors import CommandRefused
from .guest import Guest


class Portrait(msgspec.Struct, frozen=True):
    """What must be the same in the next QEMU, besides its version.

    `machine` is the versioned machine type ("pc-q35-10.0"), `devices` are the types of everything that was added by -device or
    device_add, sorted, `cpus` the type of each CPU, `ram` the size of each memory backend in bytes. `features` are the CPUID words of
    the first CPU that are not zero, by leaf, subleaf and register; empty where the architecture has none.
    """

    machine: str
    cpus: tuple[str, ...]
    devices: tuple[str, ...]
    ram: dict[str, int]
    features: dict[str, int] = {}


def portrait(guest: Guest) -> Portrait:
    """Describe the machine of a guest. The guest may run."""
    cpus = [str(each["qom-path"]) for each in guest.ask("query-cpus-fast")]
    return Portrait(
        machine=str(qom_property(guest, "/machine", "type")).removesuffix("-machine"),
        cpus=tuple(str(qom_property(guest, path, "type")) for path in cpus),
        features=_features(guest, cpus[0]),
        devices=tuple(sorted(_devices(guest))),
        ram={str(each["id"]): int(each["size"]) for each in guest.ask("query-memdev")},
    )


def differences(saved: Portrait, now: Portrait) -> list[str]:
    """Return in words what differs, empty if nothing does."""
    old, new = _words(saved), _words(now)
    found = [f"{what}: {old[what]} was saved, {new[what]} is there" for what in old if old[what] != new[what]]
    # A guest does not mind a feature that it has not found at boot, and a new kernel or QEMU may bring some.
    for word, bits in saved.features.items():
        if lost := bits & ~now.features.get(word, 0):
            found.append(f"CPU features are missing: {word} {lost:#x}")
    return found


def qom_property(guest: Guest, path: str, name: str) -> Any:
    """Return a property of an object of QEMU (qom-get)."""
    return guest.ask("qom-get", path=path, property=name)


def _words(of: Portrait) -> dict[str, str]:
    return {
        "machine": of.machine,
        "cpus": ", ".join(of.cpus),
        "devices": ", ".join(of.devices) or "none",
        "ram": ", ".join(f"{name}={size}" for name, size in sorted(of.ram.items())) or "none",
    }


def _features(guest: Guest, path: str) -> dict[str, int]:
    try:
        words = qom_property(guest, path, "feature-words")
    except CommandRefused:
        return {}  # CPUs of other architectures have no such property
    return {
        f"cpuid {each['cpuid-input-eax']:#x}.{each.get('cpuid-input-ecx', 0)} {each['cpuid-register']}": int(
            each["features"]
        )
        for each in words
        if each["features"]
    }


def _devices(guest: Guest) -> list[str]:
    found: list[str] = []
    for path in ("/machine/peripheral", "/machine/peripheral-anon"):
        for each in guest.ask("qom-list", path=path):
            kind = str(each["type"])
            if kind.startswith("child<") and kind.endswith(">"):
                found.append(kind[len("child<") : -1])
    return found
