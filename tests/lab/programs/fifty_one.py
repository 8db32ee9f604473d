# SPDX-License-Identifier: Apache-2.0
"""The trap of 51 outgoing sessions and a refused duplicate: `make guarded`, `make unguarded`, and `take` in the next kernel.

One block of session records holds 51. A CREATE_SESSION that fails with EEXIST when it is exactly full leaves an empty block behind,
which the next kernel takes for damage and panics. Creating and closing any session afterwards drops the block.
"""

from __future__ import annotations

import errno
import os
import signal
import sys

from raw import create, fails, finish, memfd, preserve, retrieve, retrieve_fd

from luod.lab.report import emit, ready

SESSIONS = 51


def main() -> int:
    verb = sys.argv[1]
    if verb == "make":
        sessions = [create(f"s{number}") for number in range(SESSIONS)]
        preserve(sessions[-1], 1, memfd(b"still here"))
        with fails(errno.EEXIST):
            create("s0")
        if sys.argv[2] == "guarded":
            os.close(create("scratch"))
        ready()
        signal.pause()
    taken = 0
    for number in range(SESSIONS):
        session = retrieve(f"s{number}")
        if number == SESSIONS - 1:
            assert os.pread(retrieve_fd(session, 1), 10, 0) == b"still here"
        finish(session)
        os.close(session)
        taken += 1
    emit("taken", sessions=taken)
    return 0


if __name__ == "__main__":
    sys.exit(main())
