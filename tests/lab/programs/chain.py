# SPDX-License-Identifier: Apache-2.0
"""One memfd through update after update: `chain.py BOOT` takes it over (but in boot 0 makes it), adds its mark and hands it on.

Each boot also leaves one session that the next does not take: it must be gone in the one after that.
"""

from __future__ import annotations

import errno
import os
import signal
import sys

from raw import PAGE, create, fails, finish, memfd, preserve, retrieve, retrieve_fd

from luod.lab.report import emit, ready


def main() -> int:
    boot = int(sys.argv[1])
    if boot == 0:
        fd = memfd(b"", 16 * PAGE)
    else:
        incoming = retrieve("chain")
        fd = retrieve_fd(incoming, 0xC0FFEE)
        finish(incoming)
        os.close(incoming)
        with fails(errno.ENOENT):
            retrieve(f"left-{boot - 2}")
    marks = [os.pread(fd, 1, number * PAGE)[0] for number in range(16)]
    assert marks == [number + 1 if number < boot else 0 for number in range(16)], marks
    os.pwrite(fd, bytes([boot + 1]), boot * PAGE)
    preserve(create("chain"), 0xC0FFEE, fd)
    preserve(create(f"left-{boot}"), 1, memfd(b"left"))
    emit("link", marks=marks)
    ready()
    signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
