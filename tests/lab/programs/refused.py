# SPDX-License-Identifier: Apache-2.0
"""The kernel refuses the jump: for want of permission, then for want of an image. Nothing is lost, and the next try works.

`make KERNEL` holds a session over both refusals and then jumps; `take` finds what it held.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from raw import create, finish, memfd, preserve, retrieve, retrieve_fd

from luod.adapters.liveupdate.device import LiveUpdate
from luod.adapters.liveupdate.errors import KernelError
from luod.adapters.liveupdate.syscalls import RealSyscalls
from luod.engine.ports import KexecImage
from luod.lab.report import emit


def refusal(kernel: LiveUpdate) -> int:
    try:
        kernel.kexec()
    except KernelError as error:
        return error.errno


def as_nobody(kernel: LiveUpdate) -> int:
    """Ask for the jump from a process without CAP_SYS_BOOT."""
    pid = os.fork()
    if pid == 0:
        os.setresuid(65534, 65534, 65534)
        os._exit(refusal(kernel))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> int:
    if sys.argv[1] == "take":
        session = retrieve("held")
        assert os.pread(retrieve_fd(session, 1), 6, 0) == b"before"
        assert os.pread(retrieve_fd(session, 2), 5, 0) == b"after"
        finish(session)
        return 0
    kernel = LiveUpdate(RealSyscalls())
    session = create("held")
    preserve(session, 1, memfd(b"before"))
    image = KexecImage(Path(sys.argv[2]), None, Path("/proc/cmdline").read_text("utf-8").strip())
    kernel.load(image)
    told = {
        "loaded": kernel.loaded(),
        "nobody": errno.errorcode[as_nobody(kernel)],
        "still_loaded": kernel.loaded(),
    }
    kernel.unload()
    told |= {"unloaded": not kernel.loaded(), "no_image": errno.errorcode[refusal(kernel)]}
    emit("refused", **told)
    preserve(session, 2, memfd(b"after"))
    kernel.load(image)
    os.sync()
    return refusal(kernel)


if __name__ == "__main__":
    sys.exit(main())
