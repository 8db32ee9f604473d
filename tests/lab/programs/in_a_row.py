# SPDX-License-Identifier: Apache-2.0
"""Three updates with luod and the same client ids, one boot of it: `in_a_row.py BOOT CLIENTS SIZE [NEXT KERNEL]`.

On the way: another update is refused while sessions wait for their clients, and every cgroup tells what it was charged before and after
the clients have taken their memory back.
"""

from __future__ import annotations

import sys
from pathlib import Path

from luod.lab.crew import Crew, charged
from luod.lab.report import emit


def main() -> int:
    boot, clients, size = map(int, sys.argv[1:4])
    image = Path(sys.argv[4]) if len(sys.argv) > 4 else None
    crew = Crew([f"vm{number}" for number in range(clients)], size, image=image)
    crew.start_keeper()
    crew.start_luod()
    if boot:
        if image is not None:
            with crew.link() as link:
                link.load(str(image), cmdline=crew.cmdline)
            refusal = crew.refused()
            emit("unfinished", code=refusal.code, hint=refusal.hint, states=crew.states())
        before = {name: charged(name) for name in ("luod", "keeper")}
        crew.start_clients(2)
        compared = crew.wait_clients("finished")
        update = crew.until_done()
        grown = {name: charged(name) - before[name] for name in before}
        emit(
            "done",
            bytes=compared,
            update=update["id"],
            state=update["state"],
            states=crew.states(),
            grown=grown,
        )
    if image is None:
        crew.stop()
        return 0
    crew.start_clients(1)
    emit("ended", state=crew.update())
    return 1


if __name__ == "__main__":
    sys.exit(main())
