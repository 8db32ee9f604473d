# SPDX-License-Identifier: Apache-2.0
"""The trap of 51 sessions with luod: `crowd.py make KERNEL guarded|unguarded`, and `crowd.py take` in the next kernel.

Fifty clients and luod's black box fill one block of the kernel's records. Somebody asks for a session of a name that is taken. Then luod
goes on to its jump; `unguarded` is a luod that makes no scratch session.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from luod.adapters.liveupdate.errors import SessionExists
from luod.client import Client
from luod.daemon import effects
from luod.lab.crew import PATIENCE_S, RUN, Crew
from luod.lab.report import emit

CLIENTS = [f"vm{number}" for number in range(50)]


def main() -> int:
    crew = Crew([], 0, image=Path(sys.argv[2]) if len(sys.argv) > 2 else None)
    if sys.argv[1] == "make" and sys.argv[3] == "unguarded":
        effects.Scratch.apply = lambda self, intent: {}  # type: ignore[method-assign]
    crew.start_keeper()
    crew.start_luod()
    client = Client.connect(RUN / "liveupdate.sock", timeout=PATIENCE_S)
    client.hello([])
    if sys.argv[1] == "take":
        for name in CLIENTS:
            fd = client.claim(name).fds.pop(0)
            crew.kernel.finish(fd)
            client.finished(name)
            os.close(fd)
        emit(
            "taken", state=crew.until_done()["state"], finished=list(crew.states().values()).count("finished")
        )
        client.close()
        crew.stop()
        return 0
    for name in CLIENTS:
        client.subscribe(name)
    with crew.link() as link:
        link.load(str(crew.image), cmdline=crew.cmdline)
        link.kexec(deadline_s=900)
    for _ in CLIENTS:
        client.next_event(PATIENCE_S, names=("START_PRESERVATION",))
    for name in CLIENTS[:-1]:
        client.ready(name)
    try:
        crew.kernel.create_session("luod.vm0.1")
    except SessionExists:
        emit("exists", sessions=len(CLIENTS) + 1)
    # With the last one ready luod jumps, so that this call has no answer.
    client.ready(CLIENTS[-1])
    client.next_event(PATIENCE_S, names=("RESUME", "ABORT"))
    return 1


if __name__ == "__main__":
    sys.exit(main())
