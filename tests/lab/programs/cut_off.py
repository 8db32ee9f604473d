# SPDX-License-Identifier: Apache-2.0
"""The power is cut at bad moments, and the last jump is into a kernel without live update: `cut_off.py WHEN SIZE [KERNEL]`.

preserved   the clients have preserved, one does not freeze
armed       LOST is what luod says of the sessions before; then luod hangs between the barrier and its jump
jump        the same again; then an update is carried out
restoring   one client has finished, the other has claimed and compared, and hangs
disabled    what was finished stays so, the other is lost; then the jump into a kernel that does not hand anything over
cold        everything is lost, everybody hears so, and a new beginning is possible
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from luod.client import Client, ClientError
from luod.lab.crew import RUN, Crew, halt_at, stopped
from luod.lab.jump import next_cmdline
from luod.lab.report import emit, ready

CLIENTS = ("vm0", "vm1")
SCRATCH = "update/{}/scratch:after_intent"


def lost(crew: Crew) -> None:
    """Claim as a client does after a boot, and tell the host what luod says, and how long it takes."""
    began, answers = time.monotonic(), dict[str, str]()
    for name in CLIENTS:
        with Client.connect(RUN / "liveupdate.sock", timeout=60) as client:
            client.hello()
            try:
                client.claim(name)
                answers[name] = "claimed"
            except ClientError as error:
                answers[name] = f"{error.code}: {error.hint}"
    seconds = round(time.monotonic() - began, 3)
    with crew.link() as link:
        status = link.status()
    update = status["update"]["state"] if status["update"] else None
    kernel = status["kernel"]["state"]
    emit("lost", answers=answers, seconds=seconds, update=update, states=crew.states(), kernel=kernel)


def hang(crew: Crew, number: int) -> None:
    """Order an update in which luod stops after it has armed."""
    crew.points = halt_at(SCRATCH.format(number))
    crew.start_luod()
    crew.start_clients(1)
    with crew.link() as link:
        link.load(str(crew.image), cmdline=crew.cmdline)
        link.kexec(deadline_s=900)
        stopped(crew.children["luod"])


def main() -> int:
    when, size = sys.argv[1], int(sys.argv[2])
    image = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    crew = Crew(CLIENTS, size, image=image)
    crew.start_keeper()
    began = time.monotonic()
    crew.start_luod()
    emit("started", when=when, seconds=round(time.monotonic() - began, 3))
    match when:
        case "preserved":
            crew.start_clients(1, hold_at={"vm1": "preserved"})
            with crew.link() as link:
                link.load(str(image), cmdline=crew.cmdline)
                link.kexec(deadline_s=900)
            for name in CLIENTS:
                crew.until(name, "preserved")
            crew.until("vm0", "ready")
            emit("about", when=when, states=crew.states())
            ready()
            return crew.children["keeper"].ended(None)
        case "armed":
            lost(crew)
            hang(crew, 2)
            emit("about", when=when)
            ready()
            return crew.children["keeper"].ended(None)
        case "jump":
            lost(crew)
            crew.start_clients(1)
            with crew.link() as link:
                link.load(str(image), cmdline=crew.cmdline)
            emit("ended", state=crew.update())
            return 1
        case "restoring":
            crew.start_clients(2, hold_at={"vm1": "verified"})
            crew.until("vm0", "finished")
            crew.until("vm1", "verified")
            emit("about", when=when, states=crew.states())
            ready()
            return crew.children["keeper"].ended(None)
        case "disabled":
            lost(crew)
            crew.cmdline = next_cmdline(crew.cmdline, "kho=on")
            crew.start_clients(1)
            emit("ended", state=crew.update())
            return 1
        case _:
            lost(crew)
            crew.start_clients(1)
            refusal = crew.refused()
            emit("again", code=refusal.code, states=crew.states())
            crew.stop()
            return 0


if __name__ == "__main__":
    sys.exit(main())
