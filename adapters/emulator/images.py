# SPDX-License-Identifier: Apache-2.0
"""Kernel images of the emulated machine, and what kexec_file_load checks of them.

An image is a stub that `stub_image` writes: a magic line and a JSON object naming the strings that kernel speaks. A real bzImage
or arm64 Image is taken for a kernel that speaks the same as Linux 7.3.4. Anything else is ENOEXEC.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import msgspec

from ..liveupdate import abi
from ..liveupdate.diagnosis import cmdline_flag
from .handlers import Refused

STUB_MAGIC = b"#!luod-emulated-kernel\n"
_LIMIT = 1 << 20


class KernelImage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kernel as the emulator sees it: its strings, and how it was configured.

    `handlers` maps the kind of a file handler to its compatible string, or to None where that kernel has no such handler; kinds not
    named have their usual string. `kho_default` is CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT.
    """

    release: str = "7.3.4"
    luo: str = abi.LUO_COMPATIBLE
    kho: str = abi.KHO_COMPATIBLE
    handlers: dict[str, str | None] = msgspec.field(default_factory=lambda: {"memfd": abi.MEMFD_COMPATIBLE})
    config_kho: bool = True
    config_liveupdate: bool = True
    kho_default: bool = False

    def kho_enabled(self, cmdline: str) -> bool:
        """Whether this kernel runs kexec handover with that command line."""
        flag = cmdline_flag(cmdline, "kho")
        return self.config_kho and (self.kho_default if flag is None else flag)

    def live_update_enabled(self, cmdline: str) -> bool:
        """Whether this kernel offers the device with that command line."""
        return (
            self.config_liveupdate and self.kho_enabled(cmdline) and bool(cmdline_flag(cmdline, "liveupdate"))
        )


def stub_image(
    path: Path,
    release: str = "7.3.4",
    *,
    luo: str = abi.LUO_COMPATIBLE,
    kho: str = abi.KHO_COMPATIBLE,
    memfd: str | None = abi.MEMFD_COMPATIBLE,
    handlers: dict[str, str | None] | None = None,
    config_kho: bool = True,
    config_liveupdate: bool = True,
    kho_default: bool = False,
) -> Path:
    """Write a kernel image for the emulator to `path` and return it. The defaults are those of Linux 7.3.4."""
    image = KernelImage(
        release, luo, kho, {"memfd": memfd, **(handlers or {})}, config_kho, config_liveupdate, kho_default
    )
    path.write_bytes(STUB_MAGIC + msgspec.json.encode(image) + b"\n")
    return path


def read_image(fd: int) -> KernelImage:
    """Read the image behind an open file, from its start, without moving its offset."""
    try:
        head = os.pread(fd, _LIMIT, 0)
    except OSError as error:
        raise Refused(error.errno or errno.EIO) from error
    if head.startswith(STUB_MAGIC):
        try:
            return msgspec.json.decode(head[len(STUB_MAGIC) :], type=KernelImage)
        except msgspec.MsgspecError as error:
            raise Refused(errno.ENOEXEC) from error
    if head[0x202:0x206] == b"HdrS" or head[56:60] == b"ARMd":
        return KernelImage(kho_default=True)
    raise Refused(errno.ENOEXEC)


class Loaded(msgspec.Struct, frozen=True):
    """The loaded image. `handover` is False for one of kexec_load(2), which the kernel attaches no handover data to."""

    image: KernelImage
    cmdline: str
    handover: bool = True


def check_load(kernel_fd: int, initrd_fd: int, cmdline: bytes, flags: int) -> Loaded | None:
    """Check the arguments as kexec_file_load(2) does; None for an unload. `Refused` carries its errno."""
    if flags & ~abi.KEXEC_FILE_FLAGS:
        raise Refused(errno.EINVAL)
    if flags & abi.KEXEC_FILE_ON_CRASH:
        raise Refused(errno.EADDRNOTAVAIL)  # no memory is reserved for a crash kernel
    if flags & abi.KEXEC_FILE_UNLOAD:
        return None
    if kernel_fd < 0:
        raise Refused(errno.EBADF)
    image = read_image(kernel_fd)
    if not flags & abi.KEXEC_FILE_NO_INITRAMFS and initrd_fd < 0:
        raise Refused(errno.EBADF)
    if cmdline and cmdline[-1] != 0:
        raise Refused(errno.EINVAL)
    return Loaded(image, cmdline.split(b"\0", 1)[0].decode("utf-8", "surrogateescape"))
