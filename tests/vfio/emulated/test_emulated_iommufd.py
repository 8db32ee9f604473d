# SPDX-License-Identifier: Apache-2.0
"""The emulated /dev/iommu answers as that of Linux 7.3: sizes before flags before ids before the object's own rules."""

from __future__ import annotations

import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from passthrough_host import IOVA, SIZE, Host, refused, short

from luod.adapters.emulator.address_space import PAGE, RESERVED, AddressSpace, IommuFault, Memory
from luod.adapters.emulator.handlers import Refused
from luod.adapters.iommufd import abi
from luod.adapters.iommufd.device import Iommufd

TOP = (1 << 64) - 1
STRUCTS = {
    abi.DESTROY: abi.S_DESTROY,
    abi.IOAS_ALLOC: abi.S_IOAS_ALLOC,
    abi.IOAS_COPY: abi.S_IOAS_COPY,
    abi.IOAS_IOVA_RANGES: abi.S_IOAS_IOVA_RANGES,
    abi.IOAS_MAP: abi.S_IOAS_MAP,
    abi.IOAS_MAP_FILE: abi.S_IOAS_MAP_FILE,
    abi.IOAS_UNMAP: abi.S_IOAS_UNMAP,
    abi.IOAS_CHANGE_PROCESS: abi.S_IOAS_CHANGE_PROCESS,
}


@pytest.fixture
def iommufd(host: Host) -> Iommufd:
    return host.iommufd()


def test_sizes_come_first(host: Host, iommufd: Iommufd) -> None:
    for request, struct in STRUCTS.items():
        with refused(errno.EINVAL):
            host.raw(iommufd.fd, request, short(struct, struct.size - 4))
        too_long = short(struct, struct.size + 8)
        too_long[-1] = 1
        with refused(errno.E2BIG):
            host.raw(iommufd.fd, request, too_long)
    with refused(errno.ENOTTY):
        host.raw(iommufd.fd, 0x3BFF, bytearray(2))
    with refused(errno.EFAULT):
        host.raw(iommufd.fd, abi.DESTROY, bytearray(2))


def test_a_longer_struct_of_zeros_is_fine(host: Host, iommufd: Iommufd) -> None:
    buf = host.raw(iommufd.fd, abi.IOAS_ALLOC, short(abi.S_IOAS_ALLOC, 32))
    assert abi.S_IOAS_ALLOC.get(buf, "out_ioas_id") == 1


def test_flags_come_before_ids(host: Host, iommufd: Iommufd) -> None:
    for request, struct, values, code in (
        (abi.IOAS_ALLOC, abi.S_IOAS_ALLOC, {"flags": 1}, errno.EOPNOTSUPP),
        (abi.IOAS_MAP, abi.S_IOAS_MAP, {"flags": 8, "ioas_id": 9}, errno.EOPNOTSUPP),
        (abi.IOAS_MAP, abi.S_IOAS_MAP, {"flags": 1, "ioas_id": 9}, errno.EINVAL),
        (abi.IOAS_MAP, abi.S_IOAS_MAP, {"flags": 7, "ioas_id": 9, "iova": TOP}, errno.EOVERFLOW),
        (abi.IOAS_MAP, abi.S_IOAS_MAP, {"flags": 7, "ioas_id": 9}, errno.ENOENT),
        (abi.IOAS_MAP_FILE, abi.S_IOAS_MAP_FILE, {"flags": 8, "ioas_id": 9, "fd": -1}, errno.EOPNOTSUPP),
        (abi.IOAS_MAP_FILE, abi.S_IOAS_MAP_FILE, {"flags": 7, "ioas_id": 9, "fd": -1}, errno.ENOENT),
        (abi.IOAS_CHANGE_PROCESS, abi.S_IOAS_CHANGE_PROCESS, {"__reserved": 1}, errno.EOPNOTSUPP),
        (abi.HWPT_ALLOC, abi.S_HWPT_ALLOC, {"dev_id": 9}, errno.ENOENT),
    ):
        with refused(code):
            host.raw(iommufd.fd, request, struct.pack(**values))


def test_mapping_a_file(host: Host, iommufd: Iommufd) -> None:
    ioas, ram, device = iommufd.alloc_ioas(), host.memory(), host.device()
    device.bind(iommufd.fd)
    with refused(errno.EBADF):
        iommufd.map_file(ioas, -1, 0, 4096, IOVA)
    read_end, write_end = os.pipe()
    host.own(read_end), host.own(write_end)
    with refused(errno.EINVAL):
        iommufd.map_file(ioas, ram, 0, 0, IOVA)
    # Before a device needs it, what is mapped and where is not looked at.
    for fd, iova in ((read_end, IOVA), (ram, RESERVED[0])):
        other = iommufd.alloc_ioas()
        iommufd.map_file(other, fd, 0, 4096, iova)
        with refused(errno.EINVAL if fd == read_end else errno.EADDRINUSE):
            device.attach(other)
    device.attach(ioas)
    with refused(errno.EINVAL):
        iommufd.map_file(ioas, read_end, 0, 4096, IOVA)
    with refused(errno.EINVAL):
        iommufd.map_file(ioas, iommufd.fd, 0, 4096, IOVA)
    for start, length, iova, code in (
        (0, 100, IOVA, errno.EINVAL),
        (0, 0, IOVA, errno.EINVAL),
        (0, 4096, IOVA + 1, errno.EINVAL),
        (0, 2 * SIZE, IOVA, errno.EINVAL),
        (0, 4096, RESERVED[0], errno.EINVAL),
        (0, 4096, 1 << 48, errno.EINVAL),
    ):
        with refused(code):
            iommufd.map_file(ioas, ram, start, length, iova)
    assert iommufd.map_file(ioas, ram, 0, SIZE, IOVA) == IOVA
    with refused(errno.EEXIST):
        iommufd.map_file(ioas, ram, 0, 4096, IOVA + SIZE - 4096)
    chosen = iommufd.map_file(ioas, ram, 0, SIZE, None)
    assert chosen + SIZE <= IOVA or chosen >= IOVA + SIZE
    assert iommufd.mapped(ioas, IOVA, SIZE)


def test_unmapping_takes_whole_mappings(host: Host, iommufd: Iommufd) -> None:
    ioas, ram = iommufd.alloc_ioas(), host.memory()
    with refused(errno.ENOENT):
        iommufd.unmap(ioas, IOVA, 4096)
    assert iommufd.unmap(ioas, 0, TOP) == 0
    iommufd.map_file(ioas, ram, 0, SIZE, IOVA)
    with refused(errno.ENOENT):
        iommufd.unmap(ioas, IOVA, 4096)
    assert iommufd.unmap(ioas, IOVA - 4096, SIZE + 8192) == SIZE
    assert not iommufd.mapped(ioas, IOVA, SIZE)


def test_copies_outlive_their_source(host: Host) -> None:
    guest = host.guest()
    other = guest.iommufd.alloc_ioas()
    with refused(errno.ENOENT):
        guest.iommufd.copy(guest.ioas, IOVA, SIZE + 4096, other, 0x10000)
    guest.iommufd.copy(guest.ioas, IOVA, 8192, other, 0x10000)
    guest.iommufd.unmap(guest.ioas, IOVA, SIZE)
    assert not host.dma(guest.device, guest.ram)
    guest.device.attach(other)
    assert host.dma(guest.device, guest.ram, 0x10000)


def test_ranges_say_how_many_there_are(host: Host, iommufd: Iommufd) -> None:
    ioas = iommufd.alloc_ioas()
    assert iommufd.iova_ranges(ioas) == (((0, TOP),), 1)
    device = host.device()
    device.bind(iommufd.fd)
    device.attach(ioas)
    found = iommufd.iova_ranges(ioas)
    assert found.alignment == PAGE
    assert all(last < RESERVED[0] or first > RESERVED[1] for first, last in found.ranges)
    buf = abi.S_IOAS_IOVA_RANGES.pack(ioas_id=ioas, num_iovas=1)
    with refused(errno.EMSGSIZE):
        host.raw(iommufd.fd, abi.IOAS_IOVA_RANGES, buf)
    assert abi.S_IOAS_IOVA_RANGES.get(buf, "num_iovas") == len(found.ranges)


def test_objects_in_use_cannot_be_destroyed(host: Host) -> None:
    guest = host.guest()
    with refused(errno.ENOENT):
        guest.iommufd.destroy(99)
    for number in (guest.ioas, guest.hwpt, guest.device_id):
        with refused(errno.EBUSY):
            guest.iommufd.destroy(number)
    guest.device.detach()
    guest.iommufd.destroy(guest.hwpt)
    guest.iommufd.destroy(guest.ioas)
    assert guest.iommufd.alloc_ioas() == guest.ioas, "the lowest free id comes first"


def test_change_process_needs_files(host: Host, iommufd: Iommufd) -> None:
    ioas = iommufd.alloc_ioas()
    iommufd.map_file(ioas, host.memory(), 0, SIZE, IOVA)
    iommufd.change_process()
    iommufd.map(ioas, 0x7F0000000000, 4096, IOVA + SIZE)
    with refused(errno.EINVAL):
        iommufd.change_process()


def test_ids_are_asked_for_without_change(host: Host) -> None:
    guest = host.guest()
    among = range(1, 10)
    assert guest.iommufd.ioas_ids(among) == [guest.ioas]
    assert guest.iommufd.device_ids(among) == [guest.device_id]
    assert guest.iommufd.hwpt_ids(among) == [guest.hwpt]


def test_an_iommufd_lives_as_long_as_its_devices(host: Host) -> None:
    guest = host.guest()
    host.close(guest.iommufd.fd)
    assert host.dma(guest.device, guest.ram)


# -- against a model -----------------------------------------------------------------------------------------------------------

PAGES = st.integers(0, 15)
COUNTS = st.integers(1, 4)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("map"), PAGES, COUNTS, st.integers(0, 12)),
        st.tuples(st.just("unmap"), PAGES, COUNTS, st.just(0)),
        st.tuples(st.just("copy"), PAGES, COUNTS, PAGES),
    ),
    max_size=12,
)


@given(STEPS)
def test_an_address_space_is_what_a_table_of_pages_is(steps: list[tuple[str, int, int, int]]) -> None:
    """Every page is looked up in both after every step, and so is every refusal."""
    fd = os.memfd_create("model", os.MFD_CLOEXEC)
    try:
        for page in range(16):
            os.pwrite(fd, bytes([page]) * PAGE, page * PAGE)
        space, model = AddressSpace(), dict[int, tuple[int, int]]()
        for number, (what, page, count, other) in enumerate(steps):
            target = range(page, page + count)
            try:
                if what == "map":
                    memory = Memory(os.dup(fd))
                    try:
                        space.map(page * PAGE, count * PAGE, 7, memory, other * PAGE)
                    except Refused:
                        memory.close()
                        raise
                elif what == "unmap":
                    space.unmap(page * PAGE, count * PAGE)
                else:
                    pieces = space.cut(page * PAGE, count * PAGE)
                    target = range(other, other + count)
                    done = 0
                    for piece in pieces:
                        assert piece.memory is not None
                        memory = piece.memory.share()
                        try:
                            space.map(other * PAGE + piece.iova, piece.length, 7, memory, piece.start)
                        except Refused:
                            memory.close()
                            if done:
                                space.unmap(other * PAGE, done)
                            raise
                        done += piece.length
                code = 0
            except Refused as refusal:
                code = refusal.code
            assert code == expected(model, what, page, count, other, number), (what, page, count, other)
            for place in range(24):
                try:
                    seen = space.read(place * PAGE, 1)[0]
                except IommuFault:
                    seen = None
                assert seen == (model[place][0] if place in model else None), (what, target, place)
        space.close()
    finally:
        os.close(fd)


def expected(
    model: dict[int, tuple[int, int]], what: str, page: int, count: int, other: int, number: int
) -> int:
    """Do the step on a table page -> (page of memory, mapping it belongs to); the errno."""
    target = range(page, page + count)
    if what == "map":
        if any(place in model for place in target):
            return errno.EEXIST
        model.update({page + offset: (other + offset, number) for offset in range(count)})
        return 0
    if what == "unmap":
        doomed = {model[place][1] for place in target if place in model}
        whole = all(place in target for place, (_, owner) in model.items() if owner in doomed)
        if not doomed or not whole:
            return errno.ENOENT
        for place in target:
            model.pop(place, None)
        return 0
    if any(place not in model for place in target):
        return errno.ENOENT
    if any(other + offset in model for offset in range(count)):
        return errno.EEXIST
    for offset in range(count):
        memory, owner = model[page + offset]
        model[other + offset] = (memory, number * 100 + owner + 1)
    return 0
