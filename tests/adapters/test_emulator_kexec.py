# SPDX-License-Identifier: Apache-2.0
"""Reboots of the emulated machine: those that are refused, and what the next kernel makes of what it finds."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from emulated_world import CMDLINE, load

from luod.adapters import memfd
from luod.adapters.emulator.control import Control
from luod.adapters.emulator.images import stub_image
from luod.adapters.emulator.process import Emulator
from luod.adapters.kernel import open_kernel
from luod.adapters.liveupdate import abi
from luod.adapters.liveupdate.device import LiveUpdate
from luod.adapters.liveupdate.errors import (
    DeviceAbsent,
    DeviceBroken,
    DeviceDisabled,
    KexecRefused,
    SessionUnknown,
)
from luod.engine.ports import KexecImage

# -- reboots that fail, and what they leave ------------------------------------------------------------------------------------


def test_reboot_without_an_image(kernel: LiveUpdate, control: Control) -> None:
    session = kernel.create_session("stays")
    with pytest.raises(KexecRefused, match="no image is loaded") as caught:
        kernel.kexec()
    assert caught.value.errno == errno.EINVAL
    assert kernel.session_name(session) == "stays"
    os.close(session)


def test_a_refused_freeze_changes_nothing(emulator: Emulator, kernel: LiveUpdate, control: Control) -> None:
    session, fd = kernel.create_session("vm"), memfd.create("ram", 4096)
    kernel.preserve_fd(session, 1, fd)
    load(emulator)
    control.inject("freeze", errno=errno.EBUSY, session="vm", token=1)
    boot = control.boot_id()
    with pytest.raises(OSError, match="busy") as caught:
        control.kexec()
    assert caught.value.errno == errno.EBUSY
    assert control.boot_id() == boot
    assert kernel.loaded()
    kernel.preserve_fd(session, 2, other := memfd.create("more", 1))
    assert control.kexec() != boot
    for leftover in (session, fd, other):
        os.close(leftover)
    again = kernel.retrieve_session("vm")
    os.close(kernel.retrieve_fd(again, 2))
    os.close(again)


def test_cold_reboot_loses_everything(emulator: Emulator, kernel: LiveUpdate, control: Control) -> None:
    session = kernel.create_session("gone")
    load(emulator)
    control.cold_reboot()
    assert not kernel.loaded()
    with pytest.raises(SessionUnknown):
        kernel.retrieve_session("gone")
    os.close(session)


# -- the next kernel -----------------------------------------------------------------------------------------------------------


def carried(emulator: Emulator, control: Control, **image: object) -> LiveUpdate:
    """Preserve "vm", and kexec into that image."""
    kernel = open_kernel("emulated", directory=emulator.directory)
    session, fd = kernel.create_session("vm"), memfd.create("ram", 4096)
    kernel.preserve_fd(session, 1, fd)
    cmdline = str(image.pop("cmdline", CMDLINE))
    load(emulator, stub_image(emulator.directory / "image", **image), cmdline)  # type: ignore[arg-type]
    try:
        control.kexec()
    finally:
        os.close(session)
        os.close(fd)
    return kernel


def test_another_luo_string_panics(emulator: Emulator, control: Control) -> None:
    with pytest.raises(OSError, match="luo-v6") as caught:
        carried(emulator, control, luo="luo-v6")
    assert caught.value.errno == errno.EHOSTDOWN
    kernel = open_kernel("emulated", directory=emulator.directory)
    with pytest.raises(DeviceAbsent, match="panicked"):
        kernel.create_session("x")
    assert kernel.status().state == "absent"
    control.cold_reboot()
    kernel.scratch("x")


def test_panic_option_turns_a_panic_into_a_cold_boot(emulator: Emulator, control: Control) -> None:
    kernel = carried(emulator, control, luo="luo-v6", cmdline=f"{CMDLINE} panic=-1")
    with pytest.raises(SessionUnknown):
        kernel.retrieve_session("vm")
    assert control.state()["boot"] == 3


@pytest.mark.parametrize(
    ("image", "note"),
    [
        ({"kho": "kho-v5"}, "disabling revival"),
        ({"config_kho": False, "cmdline": "liveupdate=on kho=on"}, "CONFIG_KEXEC_HANDOVER"),
        ({"config_liveupdate": False}, "CONFIG_LIVEUPDATE"),
        ({"cmdline": "liveupdate=on kho=off"}, "handover is off"),
        ({"cmdline": "liveupdate=on"}, "handover is off"),
        ({"cmdline": "kho=on"}, "live update is off"),
        ({"cmdline": "kho=on liveupdate=off"}, "live update is off"),
    ],
)
def test_kernels_that_lose_everything(
    emulator: Emulator, control: Control, image: dict[str, object], note: str
) -> None:
    kernel = carried(emulator, control, **image)
    state = control.state()
    assert note in " ".join(state["notes"])
    if state["liveupdate"]:
        with pytest.raises(SessionUnknown):
            kernel.retrieve_session("vm")
        return
    assert kernel.status().state == "disabled"
    with pytest.raises(DeviceDisabled) as caught:
        kernel.create_session("x")
    assert caught.value.errno == errno.ENOENT


def test_default_on_handover(emulator: Emulator, control: Control) -> None:
    kernel = carried(emulator, control, kho_default=True, cmdline="liveupdate=on")
    os.close(kernel.retrieve_session("vm"))


@pytest.mark.parametrize("string", ["memfd-v3", None])
def test_another_memfd_string_is_eio_for_ever(
    emulator: Emulator, control: Control, string: str | None
) -> None:
    kernel = carried(emulator, control, memfd=string)
    for _ in range(2):
        with pytest.raises(DeviceBroken):
            kernel.retrieve_session("vm")
    assert kernel.status().state == "broken"


def test_the_old_kexec_load_loses_everything(
    emulator: Emulator, control: Control, kernel: LiveUpdate
) -> None:
    session = kernel.create_session("vm")
    with open(stub_image(emulator.directory / "image"), "rb") as image:
        control.kexec_load_legacy(image.fileno(), CMDLINE)
    assert kernel.loaded()
    control.kexec()
    os.close(session)
    with pytest.raises(SessionUnknown):
        kernel.retrieve_session("vm")


def test_what_kexec_file_load_refuses(
    emulator: Emulator, control: Control, kernel: LiveUpdate, tmp_path: Path
) -> None:
    image = stub_image(tmp_path / "image")
    (tmp_path / "text").write_text("no kernel")
    (tmp_path / "broken").write_bytes(image.read_bytes()[:-10])
    (tmp_path / "bzImage").write_bytes(bytes(0x202) + b"HdrS" + bytes(100))
    for name, code in (
        ("text", errno.ENOEXEC),
        ("broken", errno.ENOEXEC),
        ("none", errno.ENOENT),
        (".", errno.EISDIR),
    ):
        with pytest.raises(KexecRefused) as caught:
            kernel.load(KexecImage(tmp_path / name, None, CMDLINE))
        assert caught.value.errno == code, name
    with pytest.raises(KexecRefused) as caught:
        kernel.load(KexecImage(image, tmp_path / "no-initrd", CMDLINE))
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(KexecRefused, match="NUL"):
        kernel.load(KexecImage(image, None, "a\0b"))
    assert not kernel.loaded()
    calls = kernel.syscalls
    with open(image, "rb") as file:
        fd = file.fileno()
        cases = [
            (fd, -1, b"no NUL", abi.KEXEC_FILE_NO_INITRAMFS, errno.EINVAL),
            (fd, -1, b"x\0", 0x40, errno.EINVAL),
            (fd, -1, b"x\0", 0, errno.EBADF),
            (-1, -1, b"x\0", abi.KEXEC_FILE_NO_INITRAMFS, errno.EBADF),
            (1 << 20, -1, b"x\0", abi.KEXEC_FILE_NO_INITRAMFS, errno.EBADF),
            (fd, -1, b"x\0", abi.KEXEC_FILE_ON_CRASH | abi.KEXEC_FILE_NO_INITRAMFS, errno.EADDRNOTAVAIL),
        ]
        for kernel_fd, initrd_fd, cmdline, flags, code in cases:
            with pytest.raises(OSError) as refused:  # noqa: PT011 (the errno is what counts)
                calls.kexec_file_load(kernel_fd, initrd_fd, cmdline, flags)
            assert refused.value.errno == code
    kernel.unload()
    kernel.load(KexecImage(tmp_path / "bzImage", image, ""))
    assert kernel.loaded()
    kernel.unload()
    assert not kernel.loaded()
    control.inject("load", errno=errno.EADDRNOTAVAIL)
    with pytest.raises(KexecRefused, match="kho_scratch"):
        kernel.load(KexecImage(image, None, CMDLINE))
