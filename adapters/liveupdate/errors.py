# SPDX-License-Identifier: Apache-2.0
"""What the kernel refuses, by name.

    KernelError            .errno, .operation, .subject
      DeviceError          the device as a whole
        DeviceAbsent DeviceDisabled DeviceBusy DeviceBroken DeviceDenied
      SessionExists SessionUnknown AlreadyRetrieved BadName SessionGone
      TokenExists TokenUnknown NotPreservable ObjectBusy BadDescriptor WrongDirection RetrieveFailed
      FinishBusy KexecRefused

An errno means different things on different calls, so the class is chosen by operation and errno together; the table below is
section "errno" of the kernel's own checks (kernel/liveupdate/luo_session.c, luo_file.c, kernel/reboot.c).
"""

from __future__ import annotations

import errno as codes
import os

from ...states.errors import LuodError

_PREFERRED = {codes.EOPNOTSUPP: "EOPNOTSUPP", codes.EAGAIN: "EAGAIN", codes.EDEADLK: "EDEADLK"}


def errno_name(errno: int) -> str:
    """Return the name the kernel's sources use, where one number has two."""
    return _PREFERRED.get(errno) or codes.errorcode.get(errno, str(errno))


class KernelError(LuodError):
    """A call into the kernel failed: `operation` on `subject` (a session name, a token in hex, a path) with `errno`."""

    def __init__(self, operation: str, subject: str, errno: int, *, detail: str = "", hint: str = "") -> None:
        name = errno_name(errno)
        message = f"{operation} {subject}".rstrip() + f": {name}: {detail or os.strerror(errno)}"
        super().__init__(message, hint=hint)
        self.operation = operation
        self.subject = subject
        self.errno = errno

    @property
    def errno_name(self) -> str:
        """The symbolic errno, such as "EBUSY"."""
        return errno_name(self.errno)


class DeviceError(KernelError):
    """The live-update device as a whole cannot be used."""

    exit_code = 3


class DeviceAbsent(DeviceError):
    """There is no live-update device: the kernel has no LUO, or it is not there at all."""


class DeviceDisabled(DeviceError):
    """The kernel has LUO but was booted without it."""


class DeviceBusy(DeviceError):
    """Somebody else has the device open."""


class DeviceBroken(DeviceError):
    """EIO: the kernel could not rebuild what its predecessor handed over; only a reboot ends this."""


class DeviceDenied(DeviceError):
    """The device node does not let this user in."""


class SessionExists(KernelError):
    """An outgoing session of this name exists already."""


class SessionUnknown(KernelError):
    """No incoming session of this name: it never came, or was finished and closed."""


class AlreadyRetrieved(KernelError):
    """The incoming session is retrieved already: somebody holds its fd, or its release failed."""


class BadName(KernelError):
    """A session name the kernel cannot take: empty, over 63 bytes, or with a NUL in it."""


class SessionGone(KernelError):
    """The fd is not a live session of this kernel any more."""


class TokenExists(KernelError):
    """This token is used already in this session."""


class TokenUnknown(KernelError):
    """The session holds no file under this token: it was never preserved, or the session is finished."""


class NotPreservable(KernelError):
    """No handler of this kernel can preserve that kind of file."""


class ObjectBusy(KernelError):
    """The object is preserved already, or was retrieved and its session is not finished yet."""


class BadDescriptor(KernelError):
    """The fd to preserve is not open, or is an O_PATH one."""


class WrongDirection(KernelError):
    """The call does not fit the session: PRESERVE_FD wants an outgoing one, RETRIEVE_FD and FINISH an incoming one."""


class RetrieveFailed(KernelError):
    """The kernel could not rebuild the file; it will answer the same for ever."""


class FinishBusy(KernelError):
    """Some file of the session is not yet in a state that lets it be finished; FINISH may be tried again."""


class KexecRefused(KernelError):
    """The kernel did not load the image, or did not jump; everything is as it was before the call."""


_Row = tuple[type[KernelError], str]

_BY_OPERATION: dict[tuple[str, int], _Row] = {
    ("CREATE_SESSION", codes.EEXIST): (
        SessionExists,
        "an outgoing session has this name; get its fd from whoever holds it. After this error create and close one scratch "
        "session before any kexec: a kernel bug can otherwise panic the next kernel",
    ),
    ("CREATE_SESSION", codes.EINVAL): (BadName, "names are 1 to 63 bytes without NUL"),
    ("CREATE_SESSION", codes.ENOSPC): (
        KernelError,
        "the kernel holds no more than 510000 sessions; close some",
    ),
    ("RETRIEVE_SESSION", codes.ENOENT): (
        SessionUnknown,
        "nothing of this name came with the last kexec, or it was finished and closed, or its last holder died",
    ),
    ("RETRIEVE_SESSION", codes.EINVAL): (
        AlreadyRetrieved,
        "a session is retrieved once a boot; get the fd from whoever holds it (the fd store, the keeper or the client)",
    ),
    ("PRESERVE_FD", codes.EEXIST): (
        TokenExists,
        "use another token; one that is preserved cannot be replaced",
    ),
    ("PRESERVE_FD", codes.EBADF): (BadDescriptor, "pass an open descriptor that was not opened with O_PATH"),
    ("PRESERVE_FD", codes.ENOENT): (
        NotPreservable,
        "Linux 7.3 preserves memfds without huge pages and unlinked tmpfs files only",
    ),
    ("PRESERVE_FD", codes.EBUSY): (
        ObjectBusy,
        "already preserved by this or another session, or retrieved from one that is not finished: FINISH that one first",
    ),
    ("PRESERVE_FD", codes.EINVAL): (
        WrongDirection,
        "the session came with the last kexec: create a new one to preserve into. Of an iommufd: it maps what is no file, or was "
        "not sealed when it was mapped. Of a device: its page table is not marked",
    ),
    ("PRESERVE_FD", codes.ENOMEM): (
        KernelError,
        "preserving allocates every hole of the file; raise the memory limit of this cgroup",
    ),
    ("RETRIEVE_FD", codes.ENOENT): (
        TokenUnknown,
        "no file under this token, or the session is finished already",
    ),
    ("RETRIEVE_FD", codes.ENODEV): (
        RetrieveFailed,
        "the device is not there, or was not bound to vfio-pci when it was asked for; bind it at boot, before any client claims "
        "its session: the kernel answers the same for ever",
    ),
    ("RETRIEVE_FD", codes.EOPNOTSUPP): (
        RetrieveFailed,
        "this kernel carries such files and cannot give them back yet: their session stays until the next reboot",
    ),
    ("RETRIEVE_FD", codes.EINVAL): (
        WrongDirection,
        "the session is an outgoing one; its files can be had after the kexec",
    ),
    ("FINISH", codes.EBUSY): (
        FinishBusy,
        "restore every device of this session first, then try again; nothing was changed",
    ),
    ("FINISH", codes.EINVAL): (
        WrongDirection,
        "only a session that came with the last kexec can be finished",
    ),
    ("kexec_file_load", codes.EPERM): (
        KexecRefused,
        "needs CAP_SYS_BOOT, kernel.kexec_load_disabled=0 and a load left in kernel.kexec_load_limit_reboot",
    ),
    ("kexec_file_load", codes.EBUSY): (KexecRefused, "another kexec call is running; try again"),
    ("kexec_file_load", codes.ENOEXEC): (KexecRefused, "the file is no kernel image this kernel can start"),
    ("kexec_file_load", codes.EADDRNOTAVAIL): (
        KexecRefused,
        "kernel and initrd do not fit in the scratch area; boot cold with a larger kho_scratch=",
    ),
    ("kexec_file_load", codes.ENOENT): (KexecRefused, "give the path of an existing kernel image and initrd"),
    ("kexec_file_load", codes.EINVAL): (KexecRefused, "check the command line and the image"),
    ("reboot", codes.EPERM): (KexecRefused, "needs CAP_SYS_BOOT in the initial user namespace"),
    ("reboot", codes.EINVAL): (
        KexecRefused,
        "no image is loaded, or the caller is not in the initial pid namespace, or a device could not be frozen "
        "(its interrupts are on)",
    ),
    ("reboot", codes.EBUSY): (
        KexecRefused,
        "a kexec load is running, or a file could not be frozen; everything is as before, try again",
    ),
}

_ANY: dict[int, _Row] = {
    codes.EMFILE: (KernelError, "raise RLIMIT_NOFILE (LimitNOFILE= of the unit); nothing was touched"),
    codes.ENFILE: (KernelError, "raise fs.file-max; nothing was touched"),
    codes.ENODEV: (SessionGone, "the kernel that made this fd is gone"),
    codes.ENOTTY: (SessionGone, "this fd is no live-update session"),
    codes.EBADF: (SessionGone, "this fd is not open"),
}

_STICKY = "the kernel answers the same for ever and has dropped the content: report this file as lost"


def kernel_error(operation: str, subject: str, error: OSError) -> KernelError:
    """Turn the errno of a failed call into the error that says what it means there and what to do next."""
    errno = error.errno or codes.EIO
    row = _BY_OPERATION.get((operation, errno)) or _ANY.get(errno)
    if row is None and operation == "RETRIEVE_FD":
        row = (RetrieveFailed, _STICKY)
    if row is None and operation in {"reboot", "kexec_file_load", "kexec_file_unload"}:
        row = (KexecRefused, "nothing was changed; see the kernel log")
    kind, hint = row or (KernelError, "see the kernel log")
    return kind(operation, subject, errno, hint=hint)
