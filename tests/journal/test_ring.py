# SPDX-License-Identifier: Apache-2.0
"""The black box, and how it and the disk are put together again."""

from __future__ import annotations

import mmap
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luod.journal.errors import RingDivergence, RingError
from luod.journal.record import Entry, Record, genesis, link, parse_payload, payload, payload_of
from luod.journal.ring import HEADER_SIZE, Ring, merge
from luod.journal.writer import Journal
from luod.states.events import DaemonStopped

NAME = "2f0b8f5c-6f1e-4f0e-9b3e-000000000001"
START = genesis(NAME)


def chain_of(bodies, *, first=1, previous=START, stream="vm1.1"):
    records = []
    for number, body in enumerate(bodies, first):
        data = payload(number, stream, number, "t.v1", number * 10, number, "boot", "run", None, body)
        previous = link(previous, data)
        records.append(
            Record(number, stream, number, "t.v1", number * 10, number, "boot", "run", None, body, previous)
        )
    return records


def fresh(size=8192, head=(0, START)):
    buffer = bytearray(size)
    return buffer, Ring.format(buffer, NAME, head)


bodies = st.lists(st.binary(max_size=300), max_size=60)


@given(records=bodies.map(chain_of), cuts=st.lists(st.integers(1, 5)))
def test_the_box_holds_the_longest_tail_that_fits(records, cuts):
    buffer, ring = fresh()
    rest = list(records)
    for cut in [*cuts, len(rest) or 1]:
        ring.append(rest[:cut])
        del rest[:cut]
        if cut % 2:
            ring = Ring.attach(buffer)  # another process goes on
    assert not rest
    found = Ring.attach(buffer).read()
    assert found == records[len(records) - len(found) :]
    if len(found) < len(records):
        sizes = [20 + len(payload_of(record)) + 16 for record in records[len(records) - len(found) - 1 :]]
        assert sum(sizes) > ring.capacity


@given(records=bodies.map(chain_of), keep=st.integers(0, 600), data=st.data())
def test_a_torn_end_costs_at_most_what_was_being_written(records, keep, data):
    buffer, ring = fresh()
    ring.append(records[:-1])
    before = bytes(buffer)
    whole = Ring.attach(bytearray(before)).read()
    ring.append(records[-1:])
    changed = [at for at in range(len(buffer)) if buffer[at] != before[at]]
    torn = bytearray(before)
    for at in changed[:keep]:
        torn[at] = buffer[at]
    found = Ring.attach(torn).read()
    if found and records and found[-1] == records[-1]:
        assert found == records[len(records) - len(found) :]
    else:
        assert found == whole[len(whole) - len(found) :]
        overwritten = 20 + len(payload_of(records[-1])) + 16 + 20 + 400 if records else 0
        lost = whole[: len(whole) - len(found)]
        assert sum(36 + len(payload_of(record)) for record in lost) <= overwritten


@given(records=bodies.map(chain_of), data=st.data())
def test_a_flipped_bit_never_invents_a_record(records, data):
    buffer, ring = fresh()
    ring.append(records)
    at = data.draw(st.integers(HEADER_SIZE, len(buffer) - 1))
    buffer[at] ^= 1 << data.draw(st.integers(0, 7))
    found = Ring.attach(buffer).read()
    assert all(record in records for record in found)
    assert [record.id for record in found] == list(range(found[0].id, found[-1].id + 1)) if found else True


@given(records=bodies.map(chain_of), disk=st.integers(0, 60), data=st.data())
def test_disk_and_box_together_neither_invent_nor_lose(records, disk, data):
    on_disk = records[:disk]
    _, ring = fresh()
    ring.append(records)
    boxed = ring.read()
    head = (on_disk[-1].id, on_disk[-1].chain) if on_disk else (0, START)

    def chain_at(id):
        return on_disk[id - 1].chain if 0 < id <= len(on_disk) else None

    begins = boxed[0].id if boxed else 1
    if boxed and begins > len(on_disk) + 1:
        with pytest.raises(RingDivergence, match="do not meet"):
            merge(head, boxed, chain_at=chain_at)
    else:
        assert on_disk + merge(head, boxed, chain_at=chain_at) == records


@given(common=st.integers(0, 5), ours=st.integers(1, 5), theirs=st.integers(1, 5))
def test_two_stories_are_never_joined(common, ours, theirs):
    shared = chain_of([b"same"] * common)
    previous = shared[-1].chain if shared else START
    mine = shared + chain_of([b"mine"] * ours, first=common + 1, previous=previous)
    other = shared + chain_of([b"other"] * theirs, first=common + 1, previous=previous)
    head = (mine[-1].id, mine[-1].chain)
    with pytest.raises(RingDivergence):
        merge(head, other, chain_at=lambda id: mine[id - 1].chain)


@given(data=st.binary(max_size=200))
def test_no_bytes_break_the_parser(data):
    try:
        record = parse_payload(data, bytes(16))
    except ValueError:
        return
    assert payload_of(record) == data


def test_a_box_of_another_journal_does_not_fit():
    (record,) = chain_of([b"x"], previous=bytes(16))
    with pytest.raises(RingDivergence):
        merge((0, START), [record])


def test_records_that_do_not_hang_together_are_refused():
    first, _, third = chain_of([b"1", b"2", b"3"])
    with pytest.raises(RingDivergence, match="does not follow"):
        merge((0, START), [first, third])


def test_an_empty_box_adds_nothing():
    assert merge((7, START), []) == []


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda b: b.__setitem__(0, 0), "not a black box"),
        (lambda b: b.__setitem__(20, 1), "not a black box"),
        (lambda b: b.__delitem__(slice(6000, None)), "was 8192 bytes long"),
    ],
)
def test_what_is_no_box_is_refused(damage, match):
    buffer, ring = fresh()
    ring.release()
    damage(buffer)
    with pytest.raises(RingError, match=match):
        Ring.attach(buffer)


@pytest.mark.parametrize("buffer", [bytes(8192), bytearray(100)])
def test_a_box_needs_room_that_can_be_written(buffer):
    with pytest.raises(RingError, match="writable bytes"):
        Ring.format(buffer, NAME, (0, START))


def test_a_record_larger_than_the_box_is_refused():
    _, ring = fresh(4096)
    with pytest.raises(RingError, match="needs"):
        ring.append(chain_of([b"x" * 5000]))


def test_the_box_brings_back_what_the_disk_never_saw(opened, path):
    memory = os.memfd_create("box", os.MFD_CLOEXEC)
    os.truncate(memory, 65536)
    with mmap.mmap(memory, 65536) as shared:
        journal: Journal = opened()
        journal.append([Entry("luod", DaemonStopped("1"))])
        ring = Ring.format(shared, journal.journal_id, journal.head())
        journal.set_mirror(ring.append)
        journal.append([Entry("luod", DaemonStopped("2"))])
        journal.note([Entry("luod", DaemonStopped("3")), Entry("vm1.1", DaemonStopped("4"))])
        journal._noted.clear()  # the kexec
        journal.close()
        ring.release()

        journal = opened(boot_id="boot-2")
        box = Ring.attach(shared)
        assert box.journal == journal.journal_id
        journal.adopt(merge(journal.head(), box.read(), chain_at=journal.chain_at))
        assert [record.event().reason for record in journal.read()] == ["1", "2", "3", "4"]
        assert merge(journal.head(), box.read(), chain_at=journal.chain_at) == []
        box.release()
    os.close(memory)
