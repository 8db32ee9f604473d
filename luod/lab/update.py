# SPDX-License-Identifier: Apache-2.0
"""A whole update with luod on real kernels: the script of it, and the demo made of that script.

In the first boot luod-keeper, luod and N clients with filled memory start; an operator loads the next kernel through luod and orders the
update; luod itself makes the jump. In the second boot luod recovers from its journal and its black box, the clients claim, every byte is
compared and every session is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..course import blackout
from ..engine.book import Book
from ..journal.record import Record
from ..journal.replay import Replay
from ..states.codec import decode
from ..states.events import EffectIntended, EffectOutcome
from .images import KernelImage
from .machine import Machine
from .outcome import LabRun
from .script import STATE, Boot, Step, python, run, wait

RUN = Path("/run/luod")
LUOD_STATE = STATE / "luod"
CLIENT_MIB = 16
MIB = 1 << 20
PATIENCE_S = 180.0
SWEEP_BOOTS = 4
SWEEP_S = 420.0
"""How long one boot of a crash sweep may take."""


def keeper(**options: Any) -> Step:
    """Start luod-keeper; the next step waits until it answers."""
    arguments = ("--dir", RUN, "--kernel", "device")
    return python("keeper", "luod.adapters.keeper", *arguments, stays=True, ready=True, **options)


def luod(*arguments: str, name: str = "luod", **options: Any) -> Step:
    """Start luod on the real device, with its journal on the state disk; the next step waits until its socket answers."""
    where = ("--kernel", "device", "--state", LUOD_STATE, "--run", RUN, "--ready-fd", "5")
    return python(
        name, "luod.daemon", *where, *arguments, stays=True, ready_fd=5, timeout_s=PATIENCE_S, **options
    )


def client(name: str, boot: int, size: int, **options: Any) -> Step:
    """Start a client in a cgroup of its own; in the first boot the next step waits until it has subscribed."""
    arguments = ("--run", RUN, "--size", str(size), "--boot", str(boot))
    return python(
        name,
        "luod.lab.tenant",
        name,
        *arguments,
        stays=True,
        ready=boot == 1,
        cgroup=name,
        timeout_s=PATIENCE_S,
        **options,
    )


def order(image: KernelImage, *, leaves: bool = True, clients: int = 0, **options: Any) -> Step:
    """Load an image through luod and order the update: luod jumps, so this step takes the machine out of its boot.

    `clients` is how many luod must know before.
    """
    arguments = ("--run", RUN, "--kernel", image.path, "--clients", str(clients))
    return python("order", "luod.lab.order", *arguments, leaves=leaves, timeout_s=PATIENCE_S, **options)


def update_script(image: KernelImage, *, clients: int, size: int, jump: Step | None = None) -> list[Boot]:
    """Return the two boots of an update to `image` with clients named vm0, vm1, ... of `size` bytes each.

    `jump` is what ends the first boot instead of luod's own jump.
    """
    names = [f"vm{number}" for number in range(clients)]
    socket_directory = run("run-directory", ["/bin/mkdir", "-p", RUN])
    first = [
        socket_directory,
        keeper(),
        luod(),
        *(client(name, 1, size) for name in names),
        jump or order(image),
    ]
    copy = run("keep-journal", ["/bin/cp", "-a", LUOD_STATE, STATE / "luod-after-boot-0"])
    second = [socket_directory, copy, keeper(), luod(), *(client(name, 2, size) for name in names)]
    return [Boot(first), Boot([*second, *(wait(name, timeout_s=PATIENCE_S) for name in names)])]


def crash_script(image: KernelImage, *, clients: int, size: int) -> list[Boot]:
    """Return the boots of a crash sweep (see `luod.lab.sweep`), in which every update goes to `image`."""
    common = ("--clients", str(clients), "--size", str(size))
    boots: list[Boot] = []
    for number in range(SWEEP_BOOTS):
        arguments: list[str | Path] = ["--boot", str(number), "--boots", str(SWEEP_BOOTS), *common]
        if number < SWEEP_BOOTS - 1:
            arguments += ["--kernel", image.path]
        step = python(
            "sweep", "luod.lab.sweep", *arguments, leaves=number < SWEEP_BOOTS - 1, timeout_s=SWEEP_S
        )
        boots.append(Boot([step]))
    return boots


def lab_demo(
    kernel: KernelImage,
    next_kernel: KernelImage,
    directory: Path,
    *,
    clients: int = 3,
    size: int = CLIENT_MIB * MIB,
    timeout_s: float = 420.0,
    crash: bool = False,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[dict[str, Any], LabRun]:
    """Run a whole update between two kernels and return the demo's result object and the run.

    With `crash`, luod is killed at every crash point on the way, and more updates follow from `next_kernel` to itself.
    `size` is each client's memory in bytes. The run's directory also gets `timeline.txt`. Raises `LabRunFailed` when a step failed,
    and `LabUnavailable` when the lab cannot run here. The guest's clock starts at a full second in each boot, so `blackout_ms` is right
    to about one second.
    """
    memory_mib = 1024 + 3 * clients * size // MIB
    machine = Machine(kernel, directory, memory_mib=memory_mib)
    script = crash_script if crash else update_script
    done = machine.run(
        script(next_kernel, clients=clients, size=size),
        timeout_s=max(timeout_s, 2 * SWEEP_S) if crash else timeout_s,
        on_event=on_event,
    ).check()
    return judge(done, kernel, next_kernel), done


def judge(done: LabRun, kernel: KernelImage, next_kernel: KernelImage) -> dict[str, Any]:
    """Read the journal that a run left, and return the demo's result object."""
    journal = done.file("luod/journal.db")
    with Replay(journal) as replay:
        records = list(replay)
    book = Book(records)
    last = book.updates()[-1]
    sessions = [one for one in book.sessions() if one.update == last.id]
    black = blackout(sessions)
    crashes = done.of("crash")
    states = [str(one.state) for one in sessions]
    return {
        "kernel": f"{kernel.version} -> {next_kernel.version}",
        "sessions": len(states),
        "finished": states.count("finished"),
        "lost": states.count("lost"),
        "failed": states.count("failed"),
        "bytes_verified": sum(
            event.get("bytes", 0)
            for event in done.of("client")
            if event["at"] == "finished" and event["boot"] == len(done.boots) - 1
        ),
        "crash_points": len({event["point"] for event in crashes}) if crashes else passed(records),
        "recoveries": len(crashes),
        "blackout_ms": round(black.total_ms, 1) if black else None,
        "journal": str(journal),
        "detail": {"ending": str(last.state), "problems": []},
    }


def passed(records: Iterable[Record]) -> int:
    """Return how many crash points luod has passed where it was not killed: two around each intent, two around each call's outcome."""
    seen: set[tuple[str, str, str]] = set()
    for record in records:
        event = decode(record.type, record.body)
        # The black box is looked for before anything is recorded, so its retrieval has no points.
        if isinstance(event, EffectIntended):
            counts = event.kind != "box.retrieve"
        elif isinstance(event, EffectOutcome):
            counts = event.how == "called"
        else:
            continue
        if counts:
            seen.add((record.type, event.key, record.boot_id))
    return 2 * len(seen)
