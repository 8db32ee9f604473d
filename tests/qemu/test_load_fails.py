# SPDX-License-Identifier: Apache-2.0
"""Loads that must not happen, on a real QEMU: what it would take without a word is refused, and a good load still works after all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace
from qemu_rig import TIMEOUTS, Rig

from luod.adapters import memfd
from luod.adapters.qemu import vmstate
from luod.adapters.qemu.errors import (
    ConfigMismatch,
    ForeignRam,
    LaunchFailed,
    RamMismatch,
    RestoreFailed,
    RestoreTimeout,
    StateCorrupt,
    VmmDied,
)
from luod.adapters.qemu.load import Load

pytestmark = pytest.mark.lab


@pytest.fixture
def saved(rig: Rig) -> dict[str, Any]:
    """A guest that was saved, and whose QEMU is gone: what the new kernel finds."""
    rig.start()
    rig.speak(3)
    result = rig.do("save", runstate="running")
    rig.drain()
    rig.guest.process.kill()
    return result


def ram_hash(rig: Rig) -> str:
    return hashlib.sha256(os.pread(rig.ram, rig.size, 0)).hexdigest()


def require_unharmed(rig: Rig, saved: dict[str, Any]) -> None:
    """Another QEMU loads the same memory and state, and the guest goes on."""
    rig.processes[-1].kill()
    rig.start_incoming()
    rig.do("load", **saved)
    rig.do("resume", runstate="running")
    rig.speak(10)
    assert rig.log.findings == []


def unchecked_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let QEMU itself say what it thinks of another machine."""
    monkeypatch.setattr(Load, "_require_same_machine", lambda self, machine: None)


# -- what QEMU would take


def with_state(rig: Rig, data: bytes) -> None:
    fd = vmstate.make_vmstate()
    os.write(fd, data)
    rig.guest.keep_vmstate(fd)


def flip(data: bytes) -> bytes:
    """One bit, in the middle of the state of the devices."""
    place = len(data) * 3 // 4
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "one bit": flip,
    "one byte short": lambda data: data[:-1],
    "trailing junk": lambda data: data + bytes(-len(data) % 4096),
    "nothing": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_state_is_not_shown_to_qemu(damage: str, rig: Rig, saved: dict[str, Any]) -> None:
    good = os.pread(rig.guest.vmstate or -1, saved["bytes"], 0)
    rig.start_incoming()
    with_state(rig, DAMAGE[damage](good))
    with pytest.raises(StateCorrupt) as caught:
        rig.do("load", **saved)
    assert "memory is intact" in caught.value.hint
    # This very QEMU can still load the right one.
    with_state(rig, good)
    rig.do("load", **saved)
    rig.do("resume", runstate="running")
    rig.speak(10)
    assert rig.log.findings == []


def test_the_memory_of_another_guest_is_not_loaded(
    rig: Rig, make_rig: Callable[..., Rig], saved: dict[str, Any]
) -> None:
    other = make_rig(seed=8)
    other.start()
    other.speak(3)
    theirs = other.do("save", runstate="running")
    other.guest.process.kill()
    assert theirs["machine"] == saved["machine"]
    own, rig.guest.ram["ram0"] = rig.ram, os.dup(other.ram)
    try:
        rig.start_incoming()
        with pytest.raises(ForeignRam, match="ram0") as caught:
            rig.do("load", **saved)
        assert "do not start it" in caught.value.hint
        rig.guest.process.kill()
        os.close(rig.ram)
        # Nor memory in which the guest has gone on since: state and memory must be of one instant.
        rig.guest.ram["ram0"] = own
        before = os.pread(own, 4096, 0)
        os.pwrite(own, b"\xff" * 16, 0)
        rig.start_incoming()
        with pytest.raises(ForeignRam):
            rig.do("load", **saved)
        os.pwrite(own, before, 0)
    finally:
        rig.guest.ram["ram0"] = own
    require_unharmed(rig, saved)


OTHERS: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "one device more": ({}, ("-device", "virtio-rng-pci"), "devices: none was saved, virtio-rng-pci is there"),
    "other CPU model": ({}, ("-cpu", "Nehalem"), "cpus: qemu64-x86_64-cpu was saved, Nehalem-x86_64-cpu is"),
    "a CPU feature less": ({}, ("-cpu", "qemu64,-cx16"), "CPU features are missing: cpuid 0x1.0 ECX 0x2000"),
    "more CPUs": ({"cpus": 2}, (), "cpus: "),
    "other machine type": ({"machine": "pc-i440fx-10.0"}, (), "machine: pc-q35-10.0 was saved, pc-i440fx-10.0 is"),
    "less memory": ({"size": 8 << 20}, (), "ram: ram0=16777216 was saved, ram0=8388608 is there"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_another_machine_is_refused_before_it_is_shown_anything(
    case: str, rig: Rig, saved: dict[str, Any]
) -> None:
    options, more, words = OTHERS[case]
    rig.start_incoming(*more, **options)
    with pytest.raises(ConfigMismatch, match=words):
        rig.do("load", **saved)
    assert rig.guest.migration_status() == "none"
    require_unharmed(rig, saved)


def test_a_cpu_feature_more_is_no_matter(rig: Rig, saved: dict[str, Any]) -> None:
    """A new kernel or QEMU may bring some, and after a kexec there is no way back."""
    rig.start_incoming("-cpu", "qemu64,+avx2")
    rig.do("load", **saved)
    rig.do("resume", runstate="running")
    rig.speak(10)
    assert rig.log.findings == []


WRONG_MEMORY = {
    "share=off": "memory-backend-file,id=ram0,size={size},mem-path=/proc/self/fd/{ram},share=off",
    "a memfd of its own": "memory-backend-memfd,id=ram0,size={size},share=on",
}


@pytest.mark.parametrize("backend", WRONG_MEMORY)
def test_memory_that_is_not_ours_is_refused(backend: str, rig: Rig, saved: dict[str, Any]) -> None:
    rig.start_incoming(backend=WRONG_MEMORY[backend].format(size=rig.size, ram=rig.ram))
    with pytest.raises(RamMismatch, match="has not mapped the memfd"):
        rig.do("load", **saved)
    require_unharmed(rig, saved)


# -- what QEMU says


def test_a_memfd_too_small_for_the_command_line(rig: Rig, saved: dict[str, Any]) -> None:
    with pytest.raises(RamMismatch, match="ram0 backing store size 0x1000000 is too small"):
        rig.start_incoming(size=32 << 20)
    require_unharmed(rig, saved)


def test_a_descriptor_that_was_not_inherited(rig: Rig, saved: dict[str, Any]) -> None:
    lost = f"memory-backend-file,id=ram0,size={rig.size},mem-path=/proc/self/fd/199,share=on"
    with pytest.raises(RamMismatch, match="backing store"):
        rig.start_incoming(backend=lost)
    require_unharmed(rig, saved)


def test_an_unknown_option_is_no_matter_of_memory(rig: Rig) -> None:
    with pytest.raises(LaunchFailed, match=r"exited with 1: .*no-such-device"):
        rig.start("-device", "no-such-device")


SAID: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "less memory": ({"size": 8 << 20}, (), "Size mismatch: ram0"),
    "other machine type": ({"machine": "pc-i440fx-10.0"}, (), "Machine type received is 'pc-q35-10.0'"),
}


@pytest.mark.parametrize("case", SAID)
def test_qemu_finds_another_machine(
    case: str, rig: Rig, saved: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, more, words = SAID[case]
    unchecked_machine(monkeypatch)
    rig.start_incoming(*more, **options)
    with pytest.raises(ConfigMismatch, match=words):
        rig.do("load", **saved)
    require_unharmed(rig, saved)


def test_qemu_misses_a_device_and_a_block(
    make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(devices=("-device", "virtio-rng-pci"))
    rig.start()
    rig.speak(2)
    saved = rig.do("save", runstate="running")
    rig.guest.process.kill()
    unchecked_machine(monkeypatch)
    devices, rig.devices = rig.devices, ()
    rig.start_incoming()
    with pytest.raises(ConfigMismatch, match="virtio-rng"):
        rig.do("load", **saved)
    rig.devices = devices
    rig.guest.process.kill()
    rig.start_incoming(
        backend=f"memory-backend-file,id=ram1,size={rig.size},mem-path=/proc/self/fd/{rig.ram},share=on"
    )
    with pytest.raises(ConfigMismatch, match='Unknown ramblock "ram0"'):
        rig.do("load", **saved)
    require_unharmed(rig, saved)


def test_qemu_finds_the_capability_off(rig: Rig, saved: dict[str, Any]) -> None:
    arm = rig.guest.arm
    rig.guest.arm = lambda mode: rig.guest.capability(events=True)  # type: ignore[method-assign]
    rig.start_incoming()
    with pytest.raises(ConfigMismatch, match="x-ignore-shared is off"):
        rig.do("load", **saved)
    rig.guest.arm = arm  # type: ignore[method-assign]
    require_unharmed(rig, saved)


CUT: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "one byte": lambda data: data[:1],
    "no magic": lambda data: b"\0\0\0\0" + data[4:],
    "100 bytes": lambda data: data[:100],
    "half": lambda data: data[: len(data) // 2],
}


@pytest.mark.parametrize("cut", CUT)
def test_qemu_finds_the_state_cut_off(cut: str, rig: Rig, saved: dict[str, Any]) -> None:
    """As if it had been recorded so."""
    good = os.pread(rig.guest.vmstate or -1, saved["bytes"], 0)
    bad = CUT[cut](good)
    with_state(rig, bad)
    rig.start_incoming()
    with pytest.raises(StateCorrupt):
        rig.do("load", **{**saved, "bytes": len(bad), "sha256": hashlib.sha256(bad).hexdigest()})
    with_state(rig, good)
    require_unharmed(rig, saved)


def test_qemu_finds_the_memory_empty(rig: Rig, saved: dict[str, Any]) -> None:
    own = rig.ram
    rig.guest.ram["ram0"] = memfd.create("empty", rig.size)
    try:
        rig.start_incoming()
        with pytest.raises(RamMismatch, match="kvm-tpr-opt"):
            rig.do("load", **{**saved, "ram": vmstate.fingerprints(rig.guest.ram)})
    finally:
        os.close(rig.ram)
        rig.guest.ram["ram0"] = own
    require_unharmed(rig, saved)


def test_a_descriptor_in_the_wrong_mode(rig: Rig, saved: dict[str, Any]) -> None:
    offer = rig.guest.offer
    rig.guest.offer = lambda fd, flags, opaque: offer(fd, os.O_RDWR, opaque)  # type: ignore[method-assign]
    rig.start_incoming()
    with pytest.raises(RestoreFailed, match="matching flags"):
        rig.do("load", **saved)
    assert rig.guest.ask("query-fdsets") == []
    rig.guest.offer = offer  # type: ignore[method-assign]
    require_unharmed(rig, saved)


# -- trying again


def test_many_failed_loads_leave_memory_as_it_was(rig: Rig, saved: dict[str, Any]) -> None:
    before = ram_hash(rig)
    good = os.pread(rig.guest.vmstate or -1, saved["bytes"], 0)
    half = good[: len(good) // 2]
    for _ in range(2):
        with_state(rig, half)
        rig.start_incoming()
        wrong = {**saved, "bytes": len(half), "sha256": hashlib.sha256(half).hexdigest()}
        with pytest.raises(StateCorrupt):
            rig.do("load", **wrong)
        with pytest.raises(RestoreFailed, match="cannot load any more"):
            rig.do("load", **wrong)
        rig.guest.process.kill()
        assert ram_hash(rig) == before
    with_state(rig, good)
    rig.start_incoming()
    rig.do("load", **saved)
    rig.guest.process.kill()  # loaded, but never run
    assert ram_hash(rig) == before
    require_unharmed(rig, saved)


def test_qemu_dies_during_the_load(rig: Rig, saved: dict[str, Any]) -> None:
    process = rig.start_incoming()
    ask = rig.guest.monitor.ask

    def killing(command: str, *rest: Any, **named: Any) -> Any:
        if command == "migrate-incoming":
            process.kill()
        return ask(command, *rest, **named)

    rig.guest.monitor.ask = killing  # type: ignore[method-assign]
    with pytest.raises(VmmDied, match="ended by SIGKILL"):
        rig.do("load", **saved)
    require_unharmed(rig, saved)


def test_a_load_that_takes_too_long(rig: Rig, saved: dict[str, Any]) -> None:
    rig.start_incoming()
    rig.guest.timeouts = replace(TIMEOUTS, load_s=0.0)
    with pytest.raises(RestoreTimeout, match="more than 0 s"):
        rig.do("load", **saved)
    rig.guest.timeouts = TIMEOUTS
    require_unharmed(rig, saved)


def test_without_saved_state_there_is_nothing_to_load(rig: Rig, saved: dict[str, Any]) -> None:
    rig.start_incoming()
    rig.guest.keep_vmstate(None)
    with pytest.raises(RestoreFailed, match="no saved state"):
        rig.do("load", **saved)
