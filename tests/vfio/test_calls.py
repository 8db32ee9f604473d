# SPDX-License-Identifier: Apache-2.0
"""What reaches the seam: the struct, which of its words are descriptors, what its pointers lead to; and what an errno becomes."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from luod.adapters.chardev import NO_POINTERS, SystemCalls
from luod.adapters.iommufd import abi as io
from luod.adapters.iommufd.device import Iommufd, IovaRanges
from luod.adapters.passthrough_errors import (
    MappingRefused,
    NoSuchObject,
    NotBoundToVfio,
    NotPermitted,
    PassthroughError,
    TakenElsewhere,
    TooOld,
    WrongOrder,
    passthrough_error,
)
from luod.adapters.vfio import abi
from luod.adapters.vfio.device import VfioDevice, open_device
from luod.adapters.vfio.group import Group


class Recorder(SystemCalls):
    """A seam that keeps what it was given, and answers with what it was told to."""

    def __init__(self, answer: Any = None, error: int = 0) -> None:
        self.calls: list[tuple[int, Any, tuple[int, ...], dict[int, bytearray]]] = []
        self.answer = answer
        self.error = error

    def open(self, path: str) -> int:
        raise OSError(self.error, path)

    def ioctl(
        self,
        fd: int,
        request: int,
        argument: bytearray | int = 0,
        *,
        fds: Sequence[int] = (),
        pointers: Mapping[int, bytearray] = NO_POINTERS,
    ) -> int:
        seen = argument if isinstance(argument, int) else bytes(argument)
        self.calls.append((request, seen, tuple(fds), dict(pointers)))
        if self.error:
            raise OSError(self.error, "")
        return int(self.answer(argument, pointers) or 0) if self.answer else 0


def words(seam: Recorder) -> list[int]:
    """Read the descriptors out of the one call that was made."""
    ((_, argument, fds, _),) = seam.calls
    return [int.from_bytes(argument[at : at + 4], "little", signed=True) for at in fds]


def test_every_descriptor_in_an_argument_is_pointed_out() -> None:
    for call, expected in (
        (lambda seam: Iommufd(seam, 3).map_file(1, 77, 0, 4096, 0), [77]),
        (lambda seam: VfioDevice(seam, 3, name="d").bind(78), [78]),
        (lambda seam: VfioDevice(seam, 3, name="d").set_irqs(abi.MSIX, [80, -1, 81]), [80, 81]),
        (lambda seam: Group(seam, 3, name="g").set_container(82), [82]),
        (lambda seam: VfioDevice(seam, 3, name="d").bind(-1), []),
    ):
        seam = Recorder()
        call(seam)
        assert words(seam) == expected


def test_ranges_come_back_through_the_pointer() -> None:
    def answer(argument: bytearray, pointers: Mapping[int, bytearray]) -> None:
        ((offset, memory),) = pointers.items()
        assert offset == io.S_IOAS_IOVA_RANGES.offsets["allowed_iovas"]
        for at, (first, last) in enumerate(((0, 0xFFF), (0x10000, 0xFFFFF))):
            memory[at * 16 : at * 16 + 16] = io.S_IOVA_RANGE.pack(start=first, last=last)
        io.S_IOAS_IOVA_RANGES.put(argument, "num_iovas", 2)
        io.S_IOAS_IOVA_RANGES.put(argument, "out_iova_alignment", 4096)

    found = Iommufd(Recorder(answer), 3).iova_ranges(1)
    assert found == IovaRanges(((0, 0xFFF), (0x10000, 0xFFFFF)), 4096)


def test_a_pointer_is_the_address_of_its_memory(monkeypatch) -> None:
    memory, argument = bytearray(b"from here"), bytearray(16)
    seen: list[bytes] = []

    def ioctl(fd: int, request: int, buf: bytearray, mutate: bool) -> int:
        address = int.from_bytes(buf[8:16], "little")
        seen.append(ctypes.string_at(address, 9))
        ctypes.memmove(address, b"and  back", 9)
        return 0

    monkeypatch.setattr("luod.adapters.chardev.fcntl.ioctl", ioctl)
    SystemCalls().ioctl(3, 0x3B84, argument, pointers={8: memory})
    assert seen == [b"from here"]
    assert memory == b"and  back"


def test_a_call_that_a_signal_cuts_into_is_made_again(monkeypatch) -> None:
    answers = [InterruptedError(errno.EINTR, ""), 5]

    def ioctl(*args: object) -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("luod.adapters.chardev.fcntl.ioctl", ioctl)
    assert SystemCalls().ioctl(3, 0x3B65, 3) == 5


def test_structs_are_as_short_as_old_kernels_know_them() -> None:
    seam = Recorder()
    device = VfioDevice(seam, 3, name="d")
    device.bind(9)
    device.attach(4)
    device.detach()
    assert [(request, len(argument), argument[0]) for request, argument, _, _ in seam.calls] == [
        (abi.DEVICE_BIND_IOMMUFD, 16, 16), (abi.DEVICE_ATTACH_IOMMUFD_PT, 12, 12), (abi.DEVICE_DETACH_IOMMUFD_PT, 8, 8),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "answer"), [(errno.EEXIST, True), (errno.ENOENT, False)], ids=["mapped", "not-mapped"]
)
def test_a_mapping_is_told_by_the_errno_of_copying_it_onto_itself(number, answer) -> None:
    seam = Recorder(error=number)
    assert Iommufd(seam, 3).mapped(1, 0x10000, 4096) is answer
    ((request, argument, _, _),) = seam.calls
    asked = io.S_IOAS_COPY.unpack(argument)
    assert request == io.IOAS_COPY
    assert asked["dst_ioas_id"] == asked["src_ioas_id"] == 1
    assert asked["dst_iova"] == asked["src_iova"] == 0x10000
    assert asked["flags"] & io.MAP_FIXED_IOVA


def test_a_probe_does_not_take_any_other_errno_for_an_answer() -> None:
    broken = Recorder(error=errno.EIO)
    with pytest.raises(PassthroughError):
        Iommufd(broken, 3).mapped(1, 0, 4096)
    with pytest.raises(PassthroughError):
        Iommufd(broken, 3).ioas_ids(range(1, 4))
    with pytest.raises(PassthroughError):
        VfioDevice(broken, 3, name="d").bound()


@pytest.mark.parametrize(
    ("operation", "number", "kind", "hint"),
    [
        ("open iommufd", errno.ENOENT, TooOld, "CONFIG_IOMMUFD"),
        ("open vfio", errno.ENOENT, NotBoundToVfio, "vfio-pci"),
        ("open vfio", errno.EBUSY, TakenElsewhere, "fuser"),
        ("open vfio", errno.EACCES, NotPermitted, "user"),
        ("VFIO_DEVICE_BIND_IOMMUFD", errno.EPERM, NotPermitted, "allow_unsafe_interrupts"),
        ("VFIO_DEVICE_BIND_IOMMUFD", errno.EBUSY, TakenElsewhere, "group"),
        ("VFIO_DEVICE_BIND_IOMMUFD", errno.ENODEV, NotBoundToVfio, "driver_override"),
        ("IOMMU_IOAS_MAP_FILE", errno.ENOMEM, NotPermitted, "RLIMIT_MEMLOCK"),
        ("IOMMU_IOAS_MAP_FILE", errno.ENOTTY, TooOld, "6.13"),
        ("IOMMU_IOAS_UNMAP", errno.ENOENT, NoSuchObject, "whole"),
        ("IOMMU_IOAS_IOVA_RANGES", errno.ENOENT, NoSuchObject, "no object"),
        ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", errno.EADDRINUSE, MappingRefused, "reserved"),
        ("VFIO_DEVICE_GET_INFO", errno.EINVAL, WrongOrder, "bind the device"),
        ("VFIO_DEVICE_RESET", errno.EINVAL, PassthroughError, "cannot be reset"),
        ("read region 0 at 0x0 of", errno.EIO, PassthroughError, "low-power"),
        ("IOMMU_HWPT_ALLOC", errno.ENOMEM, PassthroughError, "kernel log"),
    ],
)
def test_an_errno_says_what_it_means_there_and_what_to_do(operation, number, kind, hint) -> None:
    error = passthrough_error(operation, "0000:00:04.0", OSError(number, os.strerror(number)))
    assert type(error) is kind
    assert errno.errorcode[number] in error.message
    assert operation in error.message
    assert "0000:00:04.0" in error.message
    assert hint in error.hint


def test_opening_a_device_that_somebody_has_is_that_error() -> None:
    with pytest.raises(TakenElsewhere, match="/dev/vfio/devices/vfio0: EBUSY"):
        open_device(Recorder(error=errno.EBUSY), "/dev/vfio/devices/vfio0")
