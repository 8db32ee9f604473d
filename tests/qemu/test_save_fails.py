# SPDX-License-Identifier: Apache-2.0
"""Saves that fail on a real QEMU, each in its own way: the guest goes on, says so, and can be saved afterwards."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from detached_tmpfs import limited_file
from msgspec.structs import replace
from qemu_rig import TIMEOUTS, Rig

from luod.adapters import memfd
from luod.adapters.qemu.errors import (
    CheckpointFailed,
    CheckpointRefused,
    CheckpointTimeout,
    CommandRefused,
    VmmDied,
)
from luod.adapters.qemu.guest import UNDER_WAY
from luod.adapters.qemu.save import Save
from luod.adapters.qemu.vmstate import make_vmstate

pytestmark = pytest.mark.lab


def sealed(seal: int, content: bytes = b"") -> Callable[[], int]:
    def make() -> int:
        fd = make_vmstate()
        os.write(fd, content)
        fcntl.fcntl(fd, memfd.F_ADD_SEALS, seal)
        return fd

    return make


def other_set(rig: Rig, flags: int) -> None:
    """Let the guest offer descriptors opened in a wrong mode."""
    offer = rig.guest.offer
    rig.guest.offer = lambda fd, _, opaque: offer(fd, flags, opaque)  # type: ignore[method-assign]


def no_set(rig: Rig) -> None:
    rig.guest.offer = lambda fd, flags, opaque: 77  # type: ignore[method-assign]


def unplugged(rig: Rig) -> None:
    pass


REFUSED: dict[str, tuple[Callable[[Rig], None], Callable[[], int], str]] = {
    "no such fdset": (no_set, make_vmstate, "Failed to find fdset /dev/fdset/77"),
    "read-only": (lambda rig: other_set(rig, os.O_RDONLY), make_vmstate, "matching flags"),
    "read-write": (lambda rig: other_set(rig, os.O_RDWR), make_vmstate, "matching flags"),
    "frozen and not empty": (
        unplugged, sealed(memfd.F_SEAL_SHRINK, b"x"), "failed to truncate migration file to offset 0",
    ),
}  # fmt: skip


def require_unharmed(rig: Rig) -> None:
    """The guest runs, QEMU holds nothing of the attempt, and a save works."""
    assert rig.guest.runstate() == "running"
    assert rig.guest.vmstate is None
    assert rig.guest.ask("query-fdsets") == []
    rig.speak(5)
    for name in ("offer", "timeouts"):
        rig.guest.__dict__.pop(name, None) if name == "offer" else setattr(rig.guest, name, TIMEOUTS)
    saved = rig.do("save", runstate="running")
    rig.guest.process.kill()
    rig.start_incoming()
    rig.do("load", **saved)
    rig.do("resume", runstate="running")
    rig.speak(5)
    assert rig.log.findings == []


@pytest.mark.parametrize("case", REFUSED)
def test_qemu_refuses_to_begin(case: str, rig: Rig) -> None:
    disturb, make, words = REFUSED[case]
    rig.start()
    rig.speak(2)
    disturb(rig)
    with pytest.raises(CheckpointRefused, match=words) as caught:
        Save(rig.guest, make_vmstate=make).apply(rig.intent("save", runstate="running"))
    assert caught.value.hint
    require_unharmed(rig)


def test_a_file_that_cannot_grow(rig: Rig) -> None:
    rig.start()
    rig.speak(2)
    with pytest.raises(CheckpointFailed, match="ram_save_setup") as caught:
        Save(rig.guest, make_vmstate=sealed(memfd.F_SEAL_GROW)).apply(rig.intent("save", runstate="running"))
    assert "cannot grow" in caught.value.hint
    require_unharmed(rig)


@pytest.mark.parametrize("place", ["beginning", "middle", "last page"])
def test_a_disk_that_is_full(place: str, rig: Rig) -> None:
    try:
        os.close(limited_file(4096))
    except PermissionError:
        pytest.skip("needs CAP_SYS_ADMIN for a small file system")
    rig.start()
    rig.speak(2)
    size = int(rig.do("save", runstate="running")["bytes"])
    rig.do("abort", runstate="running")
    room = {"beginning": 4096, "middle": size // 2, "last page": (size - 1) // 4096 * 4096}[place]
    save = Save(rig.guest, make_vmstate=lambda: limited_file(room))
    with pytest.raises(CheckpointFailed) as caught:
        save.apply(rig.intent("save", runstate="running"))
    assert caught.value.errno in ("ENOSPC", "EIO")
    require_unharmed(rig)


def test_a_paused_guest_stays_paused_when_its_save_fails(rig: Rig) -> None:
    rig.start()
    rig.speak(2)
    rig.do("pause", runstate="running")
    last = rig.drain()
    with pytest.raises(CheckpointFailed):
        Save(rig.guest, make_vmstate=sealed(memfd.F_SEAL_GROW)).apply(rig.intent("save", runstate="running"))
    assert rig.guest.runstate() == "paused"
    assert rig.drain() == last
    rig.do("abort", runstate="running")
    rig.speak(5)
    assert rig.log.findings == []


def fast(rig: Rig) -> None:
    rig.guest.ask("migrate-set-parameters", max_bandwidth=1 << 30)


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused before"])
def test_a_save_that_takes_too_long_is_cancelled(paused: bool, slow_rig: Rig) -> None:
    rig = slow_rig
    if paused:
        rig.do("pause", runstate="running")
    rig.guest.timeouts = replace(TIMEOUTS, save_s=0.2)
    with pytest.raises(CheckpointTimeout, match=r"more than 0\.2 s and was cancelled"):
        rig.do("save", runstate="running")
    assert rig.guest.runstate() == ("paused" if paused else "running")
    if paused:
        rig.do("abort", runstate="running")
    fast(rig)
    require_unharmed(rig)


def test_a_save_that_was_done_before_the_cancel_came_counts(rig: Rig) -> None:
    rig.start()
    rig.speak(2)
    rig.guest.ask("stop")
    last = rig.drain()
    rig.guest.timeouts = replace(TIMEOUTS, save_s=0.0)
    ask = rig.guest.ask

    def patient(command: str, *fds: Any, **arguments: Any) -> Any:
        if command == "migrate_cancel":
            assert rig.guest.await_migration_end(30) == "completed"
        return ask(command, *fds, **arguments)

    rig.guest.ask = patient  # type: ignore[method-assign]
    saved = rig.do("save", runstate="paused")
    rig.guest.process.kill()
    rig.start_incoming()
    rig.do("load", **saved)
    rig.do("resume", runstate="paused")
    assert rig.drain() == last


def test_abort_ends_a_save_that_another_has_begun(slow_rig: Rig) -> None:
    rig = slow_rig
    fd = make_vmstate()
    number = rig.guest.offer(fd, os.O_WRONLY, "luod.vmstate of a dead one")
    os.close(fd)
    rig.guest.arm("normal")
    rig.guest.ask("migrate", uri=f"file:/dev/fdset/{number}")
    assert rig.guest.migration_status() in UNDER_WAY
    assert rig.do("abort", runstate="running")["runstate"] == "running"
    fast(rig)
    require_unharmed(rig)


def test_a_disk_that_cannot_be_flushed_stops_the_save(make_rig: Callable[..., Rig]) -> None:
    broken = "driver=blkdebug,node-name=n0,image.driver=null-co,inject-error.0.event=none,inject-error.0.iotype=flush"
    rig = make_rig(devices=("-blockdev", broken, "-device", "virtio-blk-pci,drive=n0,id=disk"))
    rig.start()
    rig.speak(2)
    # Nothing is flushed where nothing was written.
    assert (
        rig.guest.ask("human-monitor-command", command_line='qemu-io -d disk/virtio-backend "write 0 4096"')
        == ""
    )
    with pytest.raises(CheckpointFailed, match="Input/output error"):
        rig.do("save", runstate="running")
    assert rig.guest.runstate() == "running"
    rig.speak(5)
    assert rig.log.findings == []


BACKENDS = {
    "share=off": "memory-backend-file,id=ram0,size={size},mem-path=/proc/self/fd/{ram},share=off",
    "memory-backend-memfd": "memory-backend-memfd,id=ram0,size={size},share=on",
    "memory-backend-ram": "memory-backend-ram,id=ram0,size={size},share=on",
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_that_was_written_into_the_state_is_noticed(backend: str, rig: Rig) -> None:
    rig.start(backend=BACKENDS[backend].format(size=rig.size, ram=rig.ram))
    rig.speak(2)
    with pytest.raises(CheckpointFailed, match="0 bytes stayed in place") as caught:
        rig.do("save", runstate="running")
    assert "share=on" in caught.value.hint
    assert rig.guest.runstate() == "running"
    rig.speak(5)
    assert rig.log.findings == []


def test_a_guest_with_one_block_of_memory_elsewhere(make_rig: Callable[..., Rig]) -> None:
    """A second memory that is copied must not hide behind the first, which is not."""
    rig = make_rig(
        devices=(
            "-object",
            "memory-backend-ram,id=extra,size=16M",
            "-device",
            "ivshmem-plain,memdev=extra,master=on",
        )
    )
    rig.start()
    rig.speak(2)
    rig.guest.ram["extra"] = memfd.create("extra", 16 << 20)
    with pytest.raises(CheckpointFailed, match="stayed in place"):
        rig.do("save", runstate="running")
    assert rig.guest.runstate() == "running"


def test_a_device_that_cannot_be_migrated(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(
        devices=("-object", "memory-backend-ram,id=peer,size=1M", "-device", "ivshmem-plain,memdev=peer")
    )
    rig.start()
    rig.speak(2)
    with pytest.raises(CheckpointRefused, match="'peer mode' in device 'ivshmem'") as caught:
        rig.do("save", runstate="running")
    assert "remove that device" in caught.value.hint
    assert rig.guest.runstate() == "running"


def test_another_save_without_going_on_between(rig: Rig) -> None:
    rig.start()
    rig.speak(2)
    # Saved by hand, so there is no state of ours to take up again.
    rig.guest.arm("normal")
    fd = make_vmstate()
    with rig.guest.monitor.listen() as events:
        rig.guest.ask("migrate", uri=f"file:/dev/fdset/{rig.guest.offer(fd, os.O_WRONLY, 'somebody')}")
        events.wait(
            {"MIGRATION"}, time.monotonic() + 30, accept=lambda event: event.data["status"] == "completed"
        )
    os.close(fd)
    rig.guest.await_runstate(lambda state: state == "postmigrate", 30, "postmigrate")
    with pytest.raises(CommandRefused, match="due to previous migration"):
        rig.guest.ask("migrate", uri="file:/dev/null")
    with pytest.raises(CheckpointRefused, match="it is postmigrate"):
        rig.do("save", runstate="running")
    rig.do("abort", runstate="running")
    rig.speak(5)
    assert rig.log.findings == []


# -- death


def test_qemu_dead_before_the_save(rig: Rig) -> None:
    process = rig.start()
    rig.speak(2)
    process.kill()
    with pytest.raises(VmmDied, match="ended by SIGKILL"):
        rig.do("save", runstate="running")


def test_qemu_dies_during_the_save(slow_rig: Rig) -> None:
    rig, process = slow_rig, slow_rig.guest.process
    with rig.guest.monitor.listen() as events:
        ask = rig.guest.ask

        def killing(command: str, *fds: Any, **arguments: Any) -> Any:
            answer = ask(command, *fds, **arguments)
            if command == "migrate":
                process.kill()
            return answer

        rig.guest.ask = killing  # type: ignore[method-assign]
        with pytest.raises(VmmDied, match="ended by SIGKILL"):
            rig.do("save", runstate="running")
        assert events.waiting  # it had begun
    assert rig.guest.vmstate is None


def test_qemu_dead_after_the_save_leaves_what_was_saved(rig: Rig) -> None:
    process = rig.start()
    rig.speak(2)
    saved = rig.do("save", runstate="running")
    process.kill()
    with pytest.raises(VmmDied):
        rig.do("abort", runstate="running")
    # The guest is lost in this process, and goes on in the next from what was saved: the way back when QEMU died in postmigrate.
    rig.start_incoming()
    rig.do("load", **saved)
    rig.do("resume", runstate="running")
    rig.speak(5)
    assert rig.log.findings == []
