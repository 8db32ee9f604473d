# SPDX-License-Identifier: Apache-2.0
"""A guest is started again only on what was saved of it. Each case that QEMU itself takes although it is wrong is one line here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from luod.adapters import memfd
from luod.adapters.qemu import record as records
from luod.adapters.qemu import vmstate
from luod.adapters.qemu.arguments import adapt
from luod.adapters.qemu.compare import Now, compare
from luod.adapters.qemu.errors import ConfigMismatch, ForeignRam, QemuError, RamMismatch, StateCorrupt
from luod.adapters.qemu.identity import TRAILER, Trailer, make_ram, read_trailer, write_trailer
from luod.adapters.qemu.portrait import Portrait
from luod.adapters.qemu.probe import Capabilities
from luod.adapters.qemu.record import Record, RecordDamaged, SavedRam, SavedState

PAGE = 4096
PAGES = 700
UUID = "11111111-2222-4333-8444-555555555555"
OTHER = "99999999-2222-4333-8444-555555555555"
QEMU = Capabilities(
    path="/usr/bin/qemu",
    version="10.0.2",
    machines=("pc-q35-10.0", "pc-q35-9.2"),
    aliases={"q35": "pc-q35-10.0"},
    default_machine="pc-q35-10.0",
    default_cpus={"pc-q35-10.0": "qemu64"},
    cpus=("max", "qemu64"),
    fragile_cpus=("max",),
    ram_by_fdset=False,
)
COMMAND = (
    "qemu", "-machine", "q35,smm=off", "-cpu", "qemu64", "-m", f"{PAGES * 4}K", "-smp", "2", "-device", "virtio-rng-pci",
)  # fmt: skip


@dataclass
class Scene:
    """A guest as it was saved, and what is about to be started on it; a test spoils one thing."""

    ram: dict[str, int]
    record_fd: int
    state: int
    record: Record
    digest: bytes
    command: tuple[str, ...] = COMMAND
    capabilities: Capabilities = QEMU
    features: tuple[str, ...] = ()
    replaced: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        adapted = adapt(self.command, self.capabilities, recorded_machine=self.record.hardware.machine)
        argv = adapted.argv(dict.fromkeys(self.ram, 50), Path("/q"), incoming=True)
        argv = [self.replaced.get(word, word) for word in argv]
        compare(
            self.record,
            self.digest,
            Now(tuple(argv), self.capabilities, self.features, self.ram, self.state),
        )

    def swap(self, old: str, new: str) -> None:
        assert old in self.command
        self.command = tuple(new if word == old else word for word in self.command)


def filled(fd: int, seed: int) -> int:
    for page in range(PAGES):
        os.pwrite(fd, (seed + page).to_bytes(8, "little") * (PAGE // 8), page * PAGE)
    return fd


def save(ram: dict[str, int], record_fd: int, state: int, **changes: Any) -> tuple[Record, bytes]:
    adapted = adapt(COMMAND, QEMU)
    prints = vmstate.fingerprints(ram, TRAILER)
    record = Record(
        name="vm1", uuid=UUID, generation=3, binary="qemu", qemu="10.0.2", words=adapted.words, hardware=adapted.hardware,
        cpu_features=(), portrait=Portrait("pc-q35-10.0", ("qemu64",), ("virtio-rng-pci",), {}),
        ram=tuple(SavedRam("0x100", name, each["size"], each["sample"]) for name, each in prints.items()),
        vmstate=SavedState("0x1000", os.fstat(state).st_size, vmstate.digest(state)), runstate="running",
    )  # fmt: skip
    record = replace(record, **changes)
    digest = records.write(record_fd, record)
    for name, fd in ram.items():
        write_trailer(fd, Trailer(UUID, name, record.generation, digest))
    return record, digest


@pytest.fixture
def scene() -> Iterator[Scene]:
    with ExitStack() as stack:
        ram = filled(make_ram(Trailer(UUID, "ram0"), PAGES * PAGE), 1)
        record_fd, state = records.make_memfd(), memfd.create("state", 0)
        os.pwrite(state, bytes(range(256)) * 100, 0)
        for fd in (ram, record_fd, state):
            stack.callback(os.close, fd)
        record, digest = save({"ram0": ram}, record_fd, state)
        yield Scene({"ram0": ram}, record_fd, state, record, digest)


def flip(fd: int, place: int) -> None:
    os.pwrite(fd, bytes([os.pread(fd, 1, place)[0] ^ 4]), place)


# -- what passes


def test_what_was_saved_may_be_started(scene: Scene) -> None:
    scene.check()


def test_a_newer_qemu_that_knows_the_machine_may_start_it(scene: Scene) -> None:
    scene.capabilities = replace(
        QEMU, version="11.1.3", machines=(*QEMU.machines, "pc-q35-11.1"), aliases={"q35": "pc-q35-11.1"}
    )
    scene.check()


def test_what_only_the_host_sees_may_change(scene: Scene) -> None:
    scene.command = (*scene.command, "-display", "none", "-name", "other", "-chardev", "null,id=c")
    scene.check()


@pytest.mark.parametrize(
    ("saved", "now"),
    [
        (("avx", "sse2"), ("sse2", "avx")),
        (("avx", "sse2"), ("avx", "avx2", "sse2")),
        (("level=13", "phys-bits=39"), ("level=31", "phys-bits=46")),
    ],
    ids=["the same", "more features", "higher limits"],
)
def test_a_cpu_model_of_the_hosts_own_may_mean_the_same_or_more(
    saved: tuple[str, ...], now: tuple[str, ...], scene: Scene
) -> None:
    scene.record, scene.digest = save(scene.ram, scene.record_fd, scene.state, cpu_features=saved)
    scene.features = now
    scene.check()


def test_the_words_of_another_qemu_for_a_cpu_are_not_compared_with_those_of_this_one(scene: Scene) -> None:
    scene.record, scene.digest = save(scene.ram, scene.record_fd, scene.state, cpu_features=("pmu", "sse2"))
    scene.capabilities = replace(QEMU, version="11.1.3")
    scene.features = ("sse2", "x-vendor-cpuid-only-v2")
    scene.check()


# -- what must not pass


def foreign_ram(scene: Scene) -> None:
    write_trailer(scene.ram["ram0"], Trailer(OTHER, "ram0", 3, scene.digest))


def ram_of_another_save(scene: Scene) -> None:
    write_trailer(scene.ram["ram0"], Trailer(UUID, "ram0", 2, scene.digest))


def ram_of_another_record(scene: Scene) -> None:
    write_trailer(scene.ram["ram0"], Trailer(UUID, "ram0", 3, bytes(32)))


def another_piece_of_ram(scene: Scene) -> None:
    write_trailer(scene.ram["ram0"], Trailer(UUID, "ram1", 3, scene.digest))


def no_trailer(scene: Scene) -> None:
    os.pwrite(scene.ram["ram0"], bytes(PAGE), PAGES * PAGE)


def damaged_trailer(scene: Scene) -> None:
    flip(scene.ram["ram0"], PAGES * PAGE + 30)


def flipped_first(scene: Scene) -> None:
    flip(scene.ram["ram0"], 5)


def flipped_last(scene: Scene) -> None:
    flip(scene.ram["ram0"], PAGES * PAGE - 1)


def ran_since(scene: Scene) -> None:
    filled(scene.ram["ram0"], 2)


def shorter_ram(scene: Scene) -> None:
    fd = filled(make_ram(Trailer(UUID, "ram0", 3, scene.digest), (PAGES - 1) * PAGE), 1)
    write_trailer(fd, Trailer(UUID, "ram0", 3, scene.digest))
    os.dup2(fd, scene.ram["ram0"], inheritable=False)
    os.close(fd)


def flipped_state(scene: Scene) -> None:
    flip(scene.state, 20000)


def truncated_state(scene: Scene) -> None:
    os.ftruncate(scene.state, 25599)


def longer_state(scene: Scene) -> None:
    os.ftruncate(scene.state, 25601)


def other_cpu(scene: Scene) -> None:
    scene.swap("qemu64", "max")


def other_cpu_feature(scene: Scene) -> None:
    scene.swap("qemu64", "qemu64,-nx")


def host_cpu_changed(scene: Scene) -> None:
    scene.record, scene.digest = save(scene.ram, scene.record_fd, scene.state, cpu_features=("avx", "sse2"))
    scene.features = ("sse2", "pcid")


def smaller_address_space(scene: Scene) -> None:
    scene.record, scene.digest = save(scene.ram, scene.record_fd, scene.state, cpu_features=("phys-bits=46",))
    scene.features = ("phys-bits=39",)


def another_vendor(scene: Scene) -> None:
    scene.record, scene.digest = save(
        scene.ram, scene.record_fd, scene.state, cpu_features=("vendor=GenuineIntel",)
    )
    scene.features = ("vendor=AuthenticAMD",)


def extra_device(scene: Scene) -> None:
    scene.command = (*scene.command, "-device", "virtio-balloon-pci")


def same_device_twice(scene: Scene) -> None:
    scene.command = (*scene.command, "-device", "virtio-rng-pci")


def missing_device(scene: Scene) -> None:
    scene.command = scene.command[:-2]


def other_order(scene: Scene) -> None:
    scene.command = (*scene.command[:7], *scene.command[9:], *scene.command[7:9])


def other_smp(scene: Scene) -> None:
    scene.swap("2", "4")


def share_off(scene: Scene) -> None:
    backend = f"memory-backend-file,id=ram0,size={PAGES * PAGE},mem-path=/proc/self/fd/50,share=on"
    scene.replaced[backend] = backend.replace("share=on", "share=off")


def other_file(scene: Scene) -> None:
    backend = f"memory-backend-file,id=ram0,size={PAGES * PAGE},mem-path=/proc/self/fd/50,share=on"
    scene.replaced[backend] = backend.replace("/proc/self/fd/50", "/dev/shm/ram")


def memory_of_qemus_own(scene: Scene) -> None:
    backend = f"memory-backend-file,id=ram0,size={PAGES * PAGE},mem-path=/proc/self/fd/50,share=on"
    scene.replaced[backend] = f"memory-backend-memfd,id=ram0,size={PAGES * PAGE}"


def unversioned(scene: Scene) -> None:
    scene.replaced["pc-q35-10.0,smm=off,memory-backend=ram0"] = "q35,smm=off,memory-backend=ram0"


def unversioned_record(scene: Scene) -> None:
    scene.record = replace(scene.record, hardware=replace(scene.record.hardware, machine="q35"))
    scene.replaced["pc-q35-10.0,smm=off,memory-backend=ram0"] = "q35,smm=off,memory-backend=ram0"


def other_machine(scene: Scene) -> None:
    scene.swap("q35,smm=off", "pc-q35-9.2,smm=off")


def other_machine_property(scene: Scene) -> None:
    scene.swap("q35,smm=off", "q35,smm=on")


def other_accelerator(scene: Scene) -> None:
    scene.command = (*scene.command, "-accel", "kvm")


def other_size(scene: Scene) -> None:
    scene.swap(f"{PAGES * 4}K", f"{PAGES * 8}K")


def other_name_of_ram(scene: Scene) -> None:
    scene.command = (*scene.command, "-object", "rng-random,id=ram0")
    scene.ram["ram1"] = scene.ram["ram0"]


WRONG: list[tuple[Callable[[Scene], None], type[QemuError], str]] = [
    (foreign_ram, ForeignRam, OTHER),
    (ram_of_another_save, ForeignRam, "save 2"),
    (ram_of_another_record, ForeignRam, "record"),
    (another_piece_of_ram, ForeignRam, "ram1"),
    (no_trailer, RamMismatch, "no mark"),
    (damaged_trailer, ForeignRam, "damaged"),
    (flipped_first, ForeignRam, "not what it was"),
    (flipped_last, ForeignRam, "not what it was"),
    (ran_since, ForeignRam, "not what it was"),
    (shorter_ram, RamMismatch, f"{PAGES * PAGE - PAGE} bytes"),
    (flipped_state, StateCorrupt, "sha256"),
    (truncated_state, StateCorrupt, "25599"),
    (longer_state, StateCorrupt, "25601"),
    (other_cpu, ConfigMismatch, "CPU was qemu64, and is max"),
    (other_cpu_feature, ConfigMismatch, "qemu64,-nx"),
    (host_cpu_changed, ConfigMismatch, r"means less here: -avx \("),
    (smaller_address_space, ConfigMismatch, "phys-bits was 46 and is 39"),
    (another_vendor, ConfigMismatch, "vendor was GenuineIntel and is AuthenticAMD"),
    (extra_device, ConfigMismatch, "added: `-device virtio-balloon-pci`"),
    (same_device_twice, ConfigMismatch, "added: `-device virtio-rng-pci`"),
    (missing_device, ConfigMismatch, "missing: `-device virtio-rng-pci`"),
    (other_order, ConfigMismatch, "another order"),
    (other_smp, ConfigMismatch, "missing: `-smp 2`; option added: `-smp 4`"),
    (share_off, ConfigMismatch, "share=off"),
    (other_file, ConfigMismatch, "not opened from the memfd"),
    (memory_of_qemus_own, ConfigMismatch, "not opened from the memfd"),
    (unversioned, ConfigMismatch, "'q35' has no version"),
    (unversioned_record, ConfigMismatch, "record names the machine type 'q35'"),
    (other_machine, ConfigMismatch, r"was pc-q35-10\.0, and is pc-q35-9\.2"),
    (other_machine_property, ConfigMismatch, "smm=on"),
    (other_accelerator, ConfigMismatch, "accelerator was none, and is `kvm`"),
    (other_size, ConfigMismatch, f"had {PAGES * PAGE} bytes, and has {2 * PAGES * PAGE}"),
    (other_name_of_ram, ConfigMismatch, "ram0 is missing; there is memory ram1"),
]


@pytest.mark.parametrize(("spoil", "kind", "says"), WRONG, ids=lambda each: getattr(each, "__name__", ""))
def test_what_is_wrong_is_refused(
    spoil: Callable[[Scene], None], kind: type[QemuError], says: str, scene: Scene
) -> None:
    spoil(scene)
    with pytest.raises(kind, match=says) as caught:
        scene.check()
    assert "vm1" in str(caught.value) or "memfd" in str(caught.value)
    assert caught.value.hint


def test_an_older_qemu_that_does_not_know_the_machine(scene: Scene) -> None:
    old = replace(QEMU, version="9.2.0", machines=("pc-q35-9.2",), aliases={"q35": "pc-q35-9.2"})
    argv = adapt(COMMAND, QEMU).argv({"ram0": 50}, Path("/q"), incoming=True)
    with pytest.raises(ConfigMismatch, match=r"9\.2\.0\) has no machine type pc-q35-10\.0"):
        compare(scene.record, scene.digest, Now(tuple(argv), old, (), scene.ram, scene.state))


# -- the record and the trailer themselves


def test_a_record_is_read_as_it_was_written(scene: Scene) -> None:
    assert records.read(scene.record_fd) == (scene.record, scene.digest)
    assert os.fstat(scene.record_fd).st_size == records.RECORD_BYTES


@given(st.integers(0, 1500))
def test_a_record_with_a_flipped_bit_is_refused(place: int) -> None:
    ram = make_ram(Trailer(UUID, "ram0"), PAGE)
    record_fd, state = records.make_memfd(), memfd.create("state", PAGE)
    try:
        save({"ram0": ram}, record_fd, state)
        length = int.from_bytes(os.pread(record_fd, 4, 8), "little")
        flip(record_fd, place % (44 + length))
        with pytest.raises(RecordDamaged):
            records.read(record_fd)
    finally:
        for fd in (ram, record_fd, state):
            os.close(fd)


def test_what_is_no_record(scene: Scene) -> None:
    with pytest.raises(RecordDamaged, match="no record"):
        records.read(scene.state)
    assert not records.is_memfd(scene.state)


def test_a_memfd_without_a_record_yet() -> None:
    fd = records.make_memfd()
    try:
        assert records.is_memfd(fd)
        with pytest.raises(RecordDamaged, match="sha256"):
            records.read(fd)
    finally:
        os.close(fd)


def test_a_record_of_a_later_luod(scene: Scene) -> None:
    records.write(scene.record_fd, replace(scene.record, schema=2))
    with pytest.raises(ConfigMismatch, match="schema 2"):
        records.read(scene.record_fd)


def test_an_unversioned_machine_does_not_get_into_a_record(scene: Scene) -> None:
    wrong = replace(scene.record, hardware=replace(scene.record.hardware, machine="q35"))
    with pytest.raises(ConfigMismatch, match="no version"):
        records.write(scene.record_fd, wrong)
    with pytest.raises(ConfigMismatch, match="too long"):
        records.write(scene.record_fd, replace(scene.record, words=("x" * records.RECORD_BYTES,)))


def test_a_trailer_does_not_touch_the_ram() -> None:
    fd = filled(make_ram(Trailer(UUID, "ram0"), PAGES * PAGE), 1)
    try:
        before = vmstate.sample(fd, TRAILER)
        write_trailer(fd, Trailer(UUID, "ram0", 9, bytes(range(32))))
        assert read_trailer(fd) == Trailer(UUID, "ram0", 9, bytes(range(32)))
        assert vmstate.sample(fd, TRAILER) == before
        assert os.fstat(fd).st_size == PAGES * PAGE + TRAILER
        assert memfd.inspect(fd).sealed_for_preservation
    finally:
        os.close(fd)
