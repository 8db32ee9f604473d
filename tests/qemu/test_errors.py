# SPDX-License-Identifier: Apache-2.0
"""QEMU's own words, as 10.0.2 and 11.1.3 say them, and the errors they stand for."""

from __future__ import annotations

import pytest

from luod.adapters.qemu import errors as e

RESTORE = [
    (e.RamMismatch, "ram0 backing store size 0x8000000 is too small for 'size' option 0x10000000 plus 'offset' option 0x0"),
    (e.RamMismatch, "can't open backing store /dev/fdset/1 for guest RAM: No such file or directory"),
    (e.RamMismatch, "unable to map backing store for guest RAM: Operation not permitted"),
    (e.RamMismatch, "qemu-system-x86_64: ftruncate: Operation not permitted"),
    (e.RamMismatch, "error while loading state for instance 0x0 of device 'kvm-tpr-opt'\nload failed: Operation not permitted"),
    (e.RamMismatch, "load of device 'kvm-tpr-opt': post load hook failed for: kvm-tpr-opt, version_id: 1, ret: -1"),
    (e.ConfigMismatch, "Size mismatch: ram0: 0x10000000 != 0x8000000: Invalid argument"),
    (e.ConfigMismatch, "Size mismatch: ram0: 0x10000000 != 0x8000000: Invalid argument\nFailed to load vmstate version_id: 4, ret: -22"),
    (e.ConfigMismatch, "Capability x-ignore-shared is off, but received capability is on"),
    (e.ConfigMismatch, "Failed to validate capabilities"),
    (e.ConfigMismatch, 'Unknown ramblock "ram0", cannot accept migration'),
    (e.ConfigMismatch, "Machine type received is 'pc-q35-10.0' and local is 'pc-q35-11.1'"),
    (e.ConfigMismatch, "Unknown savevm section or instance '0000:00:01.0/virtio-rng' 0. Make sure that your current VM setup matches"),
    (e.ConfigMismatch, "Unknown section or instance '0000:00:01.0/virtio-rng' 0"),
    (e.ConfigMismatch, "Missing section footer for 0000:00:1f.0/ICH9LPC"),
    (e.ConfigMismatch, "Section footer error, section_id: 14"),
    (e.StateCorrupt, "Not a migration stream"),
    (e.StateCorrupt, "Not a migration stream, magic: 0 != 5145564d"),
    (e.StateCorrupt, "Getting RAM address failed\nload of migration failed: Input/output error"),
    (e.StateCorrupt, "error while loading state section id 1(ram)\nload of migration failed: Input/output error"),
    (e.StateCorrupt, "Failed to load vmstate version_id: 4, ret: -5"),
    (e.RestoreFailed, "something that nobody has seen yet"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "words"), RESTORE, ids=[words[:40] for _, words in RESTORE])
def test_what_a_new_qemu_says(kind: type[e.RestoreFailed], words: str) -> None:
    error = e.restore_error("vm1", words)
    assert type(error) is kind
    assert words.splitlines()[0][:80] in str(error)
    assert "vm1" in str(error)
    assert error.hint
    assert "\n" not in str(error)


SAVE = [
    ("Failed to find fdset /dev/fdset/7", "", "error in luod"),
    ("Failed to find file descriptor with matching flags=0x41", "", "error in luod"),
    ("failed to truncate migration file to offset 0: Operation not permitted", "EPERM", "frozen"),
    ("ram_save_setup failed: Input/output error", "EIO", "cannot grow"),
    ("Unable to write to file: No space left on device", "ENOSPC", "free memory"),
    ("Failed to flush QEMUFile: Unable to write to file: No space left on device", "ENOSPC", "free memory"),
    ("State blocked by non-migratable device '0000:00:01.0/nvme'", "", "remove that device"),
    ("Can't migrate the vm that was paused due to previous migration", "", "saved already"),
    ("Parameter 'mode' does not accept value 'cpr-exec'", "", "too old"),
    ("Cannot use postcopy with CPR", "", "capabilities"),
    ("what?", "", "stderr"),
]


@pytest.mark.parametrize(("words", "errno", "hint"), SAVE, ids=[words[:40] for words, _, _ in SAVE])
def test_what_a_saving_qemu_says(words: str, errno: str, hint: str) -> None:
    refused = e.checkpoint_refused("vm1", e.CommandRefused("migrate", "GenericError", words))
    failed = e.checkpoint_failed("vm1", words)
    for error, usual in ((refused, "EINVAL"), (failed, "EIO")):
        assert words in error.message
        assert hint in error.hint
        assert error.errno == (errno or usual)


def test_the_errno_is_the_end_of_a_line_and_nothing_else() -> None:
    assert e.errno_in("a: Operation not permitted") == "EPERM"
    assert e.errno_in("a: Invalid argument\nmore of it") == "EINVAL"
    assert e.errno_in("Operation not permitted by me") == ""
    assert e.errno_in("") == ""


def test_all_reasons_are_said() -> None:
    error = e.VmNotUpdatable("vm1", ["a", "b"], hint="c")
    assert error.reasons == ("a", "b")
    assert str(error) == "vm1 cannot be carried over: a; b (c)"
