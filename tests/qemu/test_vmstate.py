# SPDX-License-Identifier: Apache-2.0
"""Digests find every difference that QEMU does not, and the head of a real stream says which memory the guest has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luod.adapters import memfd
from luod.adapters.qemu import vmstate
from luod.adapters.qemu.errors import ForeignRam, RamMismatch, StateCorrupt

HEAD = (Path(__file__).parent / "recorded" / "qemu-10.0.2-head.bin").read_bytes()
MIB = 1 << 20


@pytest.fixture
def ram() -> Iterator[int]:
    fd = memfd.create("ram", 8 * MIB)
    os.pwrite(fd, os.urandom(MIB), 3 * MIB)
    yield fd
    os.close(fd)


def memfd_of(data: bytes) -> int:
    fd = vmstate.make_vmstate()
    os.write(fd, data)
    return fd


def test_the_state_must_be_whole_to_the_last_bit() -> None:
    data = os.urandom(300_000)
    fd = memfd_of(data)
    try:
        facts = (len(data), vmstate.digest(fd))
        vmstate.require_whole_vmstate("vm1", fd, *facts)
        assert os.lseek(fd, 0, os.SEEK_CUR) == len(data)  # its offset is carried over the kexec too
        os.pwrite(fd, bytes([data[-1] ^ 1]), len(data) - 1)
        with pytest.raises(StateCorrupt, match="sha256 differs"):
            vmstate.require_whole_vmstate("vm1", fd, *facts)
        os.pwrite(fd, data[-1:] + b"\0", len(data) - 1)
        with pytest.raises(StateCorrupt, match="300001 bytes, and was saved with 300000"):
            vmstate.require_whole_vmstate("vm1", fd, *facts)
        os.ftruncate(fd, len(data) - 1)
        with pytest.raises(StateCorrupt, match="299999 bytes"):
            vmstate.require_whole_vmstate("vm1", fd, *facts)
    finally:
        os.close(fd)


def test_memory_must_be_the_one_that_was_saved(ram: int) -> None:
    saved = vmstate.fingerprints({"ram0": ram})
    vmstate.require_own_ram("vm1", {"ram0": ram}, saved)
    other = memfd.create("ram", 8 * MIB)
    small = memfd.create("ram", 7 * MIB)
    try:
        with pytest.raises(ForeignRam, match="ram0"):
            vmstate.require_own_ram("vm1", {"ram0": other}, saved)
        with pytest.raises(RamMismatch, match="7340032 bytes, and was saved with 8388608"):
            vmstate.require_own_ram("vm1", {"ram0": small}, saved)
        with pytest.raises(RamMismatch, match=r"\['ram1'\], and was saved with \['ram0'\]"):
            vmstate.require_own_ram("vm1", {"ram1": ram}, saved)
    finally:
        os.close(other)
        os.close(small)


@pytest.mark.parametrize("page", [0, 2047, 771 * 2047 // 255 // 3])
def test_a_sample_sees_its_pages(ram: int, page: int) -> None:
    before = vmstate.sample(ram)
    os.pwrite(ram, b"\x01", page * vmstate.PAGE + 4095)
    assert vmstate.sample(ram) != before


def test_a_sample_leaves_holes_and_takes_all_of_a_small_file(ram: int) -> None:
    allocated = os.fstat(ram).st_blocks
    vmstate.sample(ram)
    assert os.fstat(ram).st_blocks == allocated
    fd = memfd.create("ram", vmstate.SAMPLES * vmstate.PAGE)
    try:
        seen = {vmstate.sample(fd)}
        for page in range(0, vmstate.SAMPLES, 5):
            os.pwrite(fd, b"x", page * vmstate.PAGE)
            seen.add(vmstate.sample(fd))
        assert len(seen) == 1 + len(range(0, vmstate.SAMPLES, 5))
    finally:
        os.close(fd)


def blocks(head: bytes) -> vmstate.RamBlocks | None:
    fd = memfd_of(head)
    try:
        return vmstate.ram_blocks(fd)
    finally:
        os.close(fd)


def test_the_head_of_a_real_stream_says_which_memory_there_is() -> None:
    found = blocks(HEAD)
    assert found is not None
    assert found.sizes["ram0"] == 16 * MIB
    assert found.sizes["pc.bios"] == 256 << 10
    assert (
        found.total == 16 * MIB + 532480
    )  # what query-migrate of that save called ram.total, and the memory that stayed


@given(st.integers(0, len(HEAD) - 1), st.integers(0, 255))
def test_a_damaged_head_says_nothing_wrong_and_never_raises(place: int, byte: int) -> None:
    damaged = HEAD[:place] + bytes([byte]) + HEAD[place + 1 :]
    for head in (damaged, HEAD[:place]):
        found = blocks(head)
        assert found is None or sum(found.sizes.values()) == found.total
