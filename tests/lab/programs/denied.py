# SPDX-License-Identifier: Apache-2.0
"""luod's own jump is refused by the kernel: `denied.py make KERNEL SIZE`, and `denied.py take SIZE` in the next kernel.

First luod has no CAP_SYS_BOOT, then the image is gone when it jumps; each time the clients compare their memory after the rollback, and
come back under the same ids. The third update is carried out.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from luod.lab.crew import Crew
from luod.lab.report import emit
from luod.views import every

CLIENTS = ("vm0", "vm1")


def look(crew: Crew, what: str, ended: str) -> None:
    """Tell the host what is left of an update that was refused."""
    compared = crew.wait_clients("aborted")
    with crew.link() as link:
        status = link.status()
        reboots = [
            (record["body"].get("errno"), record["stream"])
            for record in link.records()
            if record["type"].startswith("update.refused")
        ]
        sessions = every(link.call, "SESSIONS", "sessions")
    emit(
        "denied", what=what, ended=ended, bytes=compared, refused=reboots, reason=str(status["update"]),
        states=[one["state"] for one in sessions if one["update"] == status["update"]["id"]],
        in_doubt=status["in_doubt"], loaded=crew.kernel.loaded(),
    )  # fmt: skip


def main() -> int:
    if sys.argv[1] == "take":
        crew = Crew(CLIENTS, int(sys.argv[2]))
        crew.start_keeper()
        crew.start_luod()
        crew.start_clients(2)
        emit("taken", bytes=crew.wait_clients("finished"), state=crew.until_done()["state"])
        crew.stop()
        return 0
    crew = Crew(CLIENTS, int(sys.argv[3]), image=Path(sys.argv[2]))
    crew.start_keeper()
    crew.start_luod()
    with crew.link() as link:
        link.load(str(crew.image), cmdline=crew.cmdline)
    crew.children["luod"].stop(signal.SIGTERM)
    crew.start_luod(may_boot=False)
    crew.start_clients(1)
    look(crew, "no permission", crew.update())
    crew.children["luod"].stop(signal.SIGTERM)
    crew.start_luod()
    crew.start_clients(1)
    crew.refuse = True
    look(crew, "no image", crew.update())
    crew.refuse = False
    crew.start_clients(1)
    emit("ended", state=crew.update())
    return 1


if __name__ == "__main__":
    sys.exit(main())
