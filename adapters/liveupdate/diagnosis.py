# SPDX-License-Identifier: Apache-2.0
"""Why /dev/liveupdate does not open: told apart by what /proc says, so that the operator learns what to change."""

from __future__ import annotations

import errno
import gzip
import os
from pathlib import Path

from ...engine.ports import DeviceStatus

_TRUE = {"on", "1", "y", "yes", "true", "t"}


def cmdline_flag(cmdline: str, name: str) -> bool | None:
    """Return what `name=` says on a kernel command line (the last one wins, as in the kernel), or None without one."""
    value: bool | None = None
    for word in cmdline.split():
        key, separator, text = word.partition("=")
        if key == name and separator:
            value = text.lower() in _TRUE
    return value


def kernel_option(name: str, proc: Path = Path("/proc")) -> bool | None:
    """Whether the running kernel was built with `name`; None when it does not tell (no /proc/config.gz)."""
    try:
        with gzip.open(proc / "config.gz", "rt", encoding="ascii", errors="replace") as lines:
            return any(line.startswith(f"{name}=") for line in lines)
    except OSError:
        return None


def holders(device: Path, proc: Path = Path("/proc")) -> list[str]:
    """Name the processes that hold `device` open, as far as this user may see: "systemd (pid 1)"."""
    found: list[str] = []
    for entry in proc.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            links = [os.readlink(link) for link in (entry / "fd").iterdir()]
            comm = (entry / "comm").read_text("utf-8", "replace").strip()
        except OSError:
            continue  # it ended meanwhile, or belongs to someone else
        if str(device) in links:
            found.append(f"{comm} (pid {entry.name})")
    return found


def _absent(device: Path, proc: Path) -> DeviceStatus:
    misc = (proc / "misc").read_text("ascii", "replace") if (proc / "misc").exists() else ""
    if any(line.split()[-1:] == ["liveupdate"] for line in misc.splitlines()):
        return DeviceStatus(
            "absent",
            f"the kernel offers liveupdate but {device} does not exist",
            "mount devtmpfs on /dev, or make the node with the minor number of /proc/misc",
        )
    if kernel_option("CONFIG_LIVEUPDATE", proc) is False:
        return DeviceStatus(
            "absent",
            "this kernel was built without CONFIG_LIVEUPDATE",
            "boot a kernel with CONFIG_LIVEUPDATE and CONFIG_KEXEC_HANDOVER (Linux 7.3 or later), or run with --kernel emulated",
        )
    cmdline = (proc / "cmdline").read_text("utf-8", "replace")
    if not cmdline_flag(cmdline, "liveupdate"):
        return DeviceStatus(
            "disabled",
            "the kernel command line has no liveupdate=on",
            "add liveupdate=on kho=on to the kernel command line and boot again, or run with --kernel emulated",
        )
    if cmdline_flag(cmdline, "kho") is not True:
        return DeviceStatus(
            "disabled",
            "liveupdate=on is set but kexec handover is off, so the kernel has switched live update off",
            "add kho=on to the kernel command line and boot again",
        )
    return DeviceStatus(
        "absent",
        "liveupdate=on and kho=on are set but the kernel has no live-update device",
        "boot a kernel with CONFIG_LIVEUPDATE (Linux 7.3 or later); look for 'disabling kexec handover' in the kernel log",
    )


def diagnose(error: OSError, device: Path, proc: Path = Path("/proc")) -> DeviceStatus:
    """Say what the error of opening `device` means and what to do next."""
    code = error.errno or errno.EIO
    if code == errno.EBUSY:
        names = holders(device, proc)
        who = ", ".join(names) if names else "a process this user cannot see"
        return DeviceStatus(
            "busy", f"{device} is open in {who}", "it can be open once only; stop that process or wait for it"
        )
    if code == errno.EIO:
        return DeviceStatus(
            "broken",
            "the kernel could not rebuild the sessions that its predecessor handed over",
            "only a reboot ends this; the incoming sessions are lost. The next kernel must know the same file handlers",
        )
    if code in {errno.EACCES, errno.EPERM}:
        return DeviceStatus(
            "denied", f"{device} may not be opened by uid {os.geteuid()}", "run as root; the node is 0600"
        )
    if code in {errno.ENOENT, errno.ENODEV, errno.ENXIO}:
        return _absent(device, proc)
    return DeviceStatus("broken", f"opening {device}: {os.strerror(code)}", "see the kernel log")
