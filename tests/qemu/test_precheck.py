# SPDX-License-Identifier: Apache-2.0
"""What makes a real guest impossible to carry over is found while it runs, all of it at once, and nothing is touched."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qemu_rig import Rig

from luod.adapters import memfd
from luod.adapters.qemu.errors import VmNotUpdatable
from luod.adapters.qemu.portrait import Portrait, differences, portrait
from luod.adapters.qemu.precheck import precheck

pytestmark = pytest.mark.lab


def reasons(rig: Rig, devices: tuple[str, ...] | None = None) -> list[str]:
    """Check a guest and return why it cannot be carried over, empty if it can; it runs on either way."""
    if devices is None:
        devices = portrait(rig.guest).devices
    before = rig.guest.runstate()
    try:
        precheck(rig.guest, devices=devices)
    except VmNotUpdatable as error:
        found = list(error.reasons)
    else:
        found = []
    assert rig.guest.runstate() == before
    return found


def test_a_guest_as_it_should_be(make_rig: Callable[..., Rig], tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    rig = make_rig(
        devices=("-drive", f"file={tmp_path}/disk.img,format=raw,if=none,id=d0", "-device", "virtio-blk-pci,drive=d0",
                 "-device", "virtio-rng-pci,id=rng")
    )  # fmt: skip
    rig.start()
    rig.speak(2)
    found = precheck(rig.guest, devices=("virtio-blk-pci", "virtio-rng-pci"))
    assert found.machine == "pc-q35-10.0"
    assert found.ram == {"ram0": rig.size}
    assert found.devices == ("virtio-blk-pci", "virtio-rng-pci")
    assert found.cpus == ("qemu64-x86_64-cpu",)
    assert found.features["cpuid 0x1.0 EDX"] & 1 << 26  # SSE2
    for word in ("stop", "cont"):
        rig.guest.ask(word)
        assert reasons(rig) == []
    # What an abort left in postmigrate may be taken up by the next update.
    rig.guest.ask("stop")
    rig.do("save", runstate="paused")
    rig.do("abort", runstate="paused")
    assert reasons(rig) == []


MEMORY: dict[str, tuple[str, list[str]]] = {
    "share=off": (
        "memory-backend-file,id=ram0,size={size},mem-path=/proc/self/fd/{ram},share=off",
        ["memory ram0 has share=off: ", "memory ram0 is not mapped from its memfd"],
    ),
    "memory-backend-memfd": (
        "memory-backend-memfd,id=ram0,size={size},share=on",
        ["memory ram0 is memory-backend-memfd, whose pages QEMU copies"],
    ),
    "memory-backend-ram": (
        "memory-backend-ram,id=ram0,size={size}",
        ["memory ram0 is memory-backend-ram, whose pages QEMU copies"],
    ),
    "discard-data": (
        "memory-backend-file,id=ram0,size={size},mem-path=/proc/self/fd/{ram},share=on,discard-data=on",
        ["memory ram0 has discard-data=on"],
    ),
    "another file": (
        "memory-backend-file,id=ram0,size={size},mem-path={place}/other,share=on",
        ["memory ram0 is not mapped from its memfd"],
    ),
    "less than the memfd": (
        "memory-backend-file,id=ram0,size=8M,mem-path=/proc/self/fd/{ram},share=on",
        ["memory ram0 has 8388608 bytes, and its memfd 16777216"],
    ),
    "another id": (
        "memory-backend-file,id=ram1,size={size},mem-path=/proc/self/fd/{ram},share=on",
        ["it has no memory ram0", "memory ram1 is not in a memfd of ours"],
    ),
}


@pytest.mark.parametrize("case", MEMORY)
def test_memory_that_would_not_come_along(case: str, rig: Rig) -> None:
    backend, expected = MEMORY[case]
    backend = backend.format(size=rig.size, ram=rig.ram, place=rig.place)
    rig.start(backend=backend, **({"size": 8 << 20} if case == "less than the memfd" else {}))
    found = reasons(rig)
    assert len(found) == len(expected), found
    for each, words in zip(found, expected, strict=True):
        assert words in each


def test_everything_that_is_wrong_is_said_at_once(make_rig: Callable[..., Rig], tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    (tmp_path / "base.img").write_bytes(bytes(1 << 20))
    rig = make_rig(
        devices=("-drive", f"file={tmp_path}/disk.img,format=raw,if=none,id=d0,cache=unsafe", "-device", "virtio-blk-pci,drive=d0",
                 "-drive", f"file={tmp_path}/base.img,format=raw,if=none,id=d1,snapshot=on", "-device", "virtio-blk-pci,drive=d1",
                 "-object", "memory-backend-file,id=peer,size=1M,mem-path=" + str(tmp_path / "base.img"),
                 "-device", "ivshmem-plain,memdev=peer")
    )  # fmt: skip
    rig.start()
    found = "\n".join(reasons(rig))
    assert "QEMU says: Migration is disabled when using feature 'peer mode' in device 'ivshmem'" in found
    assert "memory peer is not in a memfd of ours" in found
    assert "disk d0 has cache=unsafe" in found
    assert "disk d1 has snapshot=on" in found


def test_a_device_plugged_in_later_would_be_lost(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(devices=("-device", "pcie-root-port,id=p0,chassis=1,slot=1"))
    rig.start()
    launched = portrait(rig.guest)
    assert reasons(rig, launched.devices) == []
    rig.guest.monitor.ask("device_add", {"driver": "virtio-rng-pci", "bus": "p0", "id": "late"})
    assert reasons(rig, launched.devices) == ["devices were plugged in since it was started: virtio-rng-pci"]
    assert reasons(rig, ("virtio-net-pci", "virtio-net-pci", *portrait(rig.guest).devices)) == [
        "devices were unplugged since it was started: virtio-net-pci, virtio-net-pci"
    ]


def test_memory_plugged_in_later_would_be_lost(rig: Rig) -> None:
    rig.start()
    rig.guest.monitor.ask("object-add", {"qom-type": "memory-backend-ram", "id": "late", "size": 1 << 20})
    (found,) = reasons(rig)
    assert "memory late is memory-backend-ram" in found


def test_a_guest_in_the_midst_of_another_migration(rig: Rig) -> None:
    rig.start_incoming()
    assert reasons(rig) == ["it is inmigrate: another migration of it is under way"]


@pytest.mark.parametrize(
    ("device", "words"),
    [("vfio-pci", "passthrough device vfio-pci"), ("vhost-user-fs-pci", "in another process")],
)
def test_devices_whose_state_is_elsewhere(
    device: str, words: str, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a device needs hardware or another program, so QEMU's list of devices is made longer."""
    rig.start()
    ask = rig.guest.ask

    def longer(command: str, *fds: Any, **arguments: Any) -> Any:
        answer = ask(command, *fds, **arguments)
        if command == "qom-list" and arguments["path"] == "/machine/peripheral":
            answer = [*answer, {"name": "x", "type": f"child<{device}>"}]
        return answer

    monkeypatch.setattr(rig.guest, "ask", longer)
    (found,) = reasons(rig)
    assert words in found


def test_a_qemu_that_is_too_old(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.start()
    ask = rig.guest.ask

    def older(command: str, *fds: Any, **arguments: Any) -> Any:
        answer = ask(command, *fds, **arguments)
        if command == "query-migrate-capabilities":
            return [each for each in answer if each["capability"] != "x-ignore-shared"]
        if command == "query-qmp-schema":
            return [each for each in answer if "cpr-reboot" not in each.get("values", ())]
        return answer

    monkeypatch.setattr(rig.guest, "ask", older)
    assert [reason.split("know the migration ")[1] for reason in reasons(rig)] == [
        "capability x-ignore-shared",
        "mode cpr-reboot (it needs 8.2 or newer)",
    ]


def test_portraits_of_different_machines_differ(make_rig: Callable[..., Rig]) -> None:
    found: list[Portrait] = []
    for options in ({}, {}, {"cpus": 2}, {"machine": "pc-q35-9.2"}):
        rig = make_rig()
        rig.start("-S", **options)
        found.append(portrait(rig.guest))
    assert differences(found[0], found[1]) == []
    assert [len(differences(found[0], other)) for other in found[2:]] == [1, 1]
    assert "pc-q35-9.2 is there" in differences(found[0], found[3])[0]


def test_a_memfd_smaller_than_the_memory(rig: Rig) -> None:
    rig.start()
    own, rig.guest.ram["ram0"] = rig.ram, memfd.create("small", 8 << 20)
    try:
        found = reasons(rig)
        assert "and its memfd 8388608" in found[0]
        assert "not mapped" in found[1]
    finally:
        os.close(rig.ram)
        rig.guest.ram["ram0"] = own
