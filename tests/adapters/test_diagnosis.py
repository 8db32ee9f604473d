# SPDX-License-Identifier: Apache-2.0
"""Why the device does not open: each reason is told apart, and each comes with what to do."""

from __future__ import annotations

import errno
import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

from luod.adapters.liveupdate.diagnosis import cmdline_flag, diagnose, holders


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "misc").write_text(" 59 memory_bandwidth\n236 device-mapper\n")
    (tmp_path / "cmdline").write_text("BOOT_IMAGE=/vmlinuz quiet\n")
    return tmp_path


def config(proc: Path, text: str) -> None:
    with gzip.open(proc / "config.gz", "wt", encoding="ascii") as file:
        file.write(text)


def say(code: int, proc: Path, device: Path = Path("/dev/liveupdate")) -> tuple[str, str, str]:
    status = diagnose(OSError(code, "x"), device, proc)
    assert status.hint
    return status.state, status.detail, status.hint


@pytest.mark.parametrize(
    ("cmdline", "state", "detail", "hint"),
    [
        ("quiet", "disabled", "no liveupdate=on", "add liveupdate=on kho=on"),
        ("liveupdate=on liveupdate=off kho=on", "disabled", "no liveupdate=on", "add liveupdate=on"),
        ("liveupdate=on", "disabled", "handover is off", "add kho=on"),
        ("liveupdate=1 kho=off", "disabled", "handover is off", "add kho=on"),
        ("liveupdate=on kho=y", "absent", "no live-update device", "CONFIG_LIVEUPDATE"),
    ],
)
def test_no_device(proc: Path, cmdline: str, state: str, detail: str, hint: str) -> None:
    (proc / "cmdline").write_text(cmdline + "\n")
    got = say(errno.ENOENT, proc)
    assert got[0] == state
    assert detail in got[1]
    assert hint in got[2]


def test_a_kernel_without_it(proc: Path) -> None:
    config(proc, "CONFIG_KEXEC=y\n# CONFIG_LIVEUPDATE is not set\n")
    assert say(errno.ENOENT, proc)[:2] == ("absent", "this kernel was built without CONFIG_LIVEUPDATE")
    config(proc, "CONFIG_LIVEUPDATE=y\n")
    assert say(errno.ENOENT, proc)[0] == "disabled"


def test_a_missing_node(proc: Path) -> None:
    (proc / "misc").write_text(" 59 memory_bandwidth\n120 liveupdate\n")
    state, detail, hint = say(errno.ENOENT, proc)
    assert (state, "does not exist" in detail, "devtmpfs" in hint) == ("absent", True, True)


@pytest.mark.parametrize(
    ("code", "state"),
    [(errno.EIO, "broken"), (errno.EACCES, "denied"), (errno.EPERM, "denied"), (errno.ENOMEM, "broken")],
)
def test_other_errnos(proc: Path, code: int, state: str) -> None:
    assert say(code, proc)[0] == state


def test_busy_names_the_holder(tmp_path: Path, proc: Path) -> None:
    device = tmp_path / "device"
    device.touch()
    assert "cannot see" in say(errno.EBUSY, proc, device)[1]
    code = f"import sys; f = open({str(device)!r}); print('open', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        comm = Path(f"/proc/{holder.pid}/comm").read_text().strip()
        assert holders(device) == [f"{comm} (pid {holder.pid})"]
        assert f"(pid {holder.pid})" in say(errno.EBUSY, Path("/proc"), device)[1]
    finally:
        holder.communicate()


def test_this_process_is_not_its_own_holder(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "device", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    assert holders(tmp_path / "device") == []
    os.close(fd)


@pytest.mark.parametrize(
    ("cmdline", "value"),
    [
        ("", None),
        ("kho", None),
        ("kho=on", True),
        ("kho=off", False),
        ("kho=1", True),
        ("kho=nonsense", False),
        ("kho=on kho=0", False),
        ("xkho=on", None),
    ],
)
def test_flags(cmdline: str, value: bool | None) -> None:
    assert cmdline_flag(cmdline, "kho") is value
