# SPDX-License-Identifier: Apache-2.0
"""The `luo-qemu` command.

    luo-qemu --name vm1 -- qemu-system-x86_64 -m 4G -drive file=/vm/disk.qcow2,if=virtio ...

Exit codes: that of QEMU (128 + N when signal N ended it); 2 a command line that cannot be carried over or wrong options; 3 luod cannot be
reached; 65 a guest that could not be restored, whose memory is kept; 70 the journal could not be written, and QEMU goes on.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import uuid
from pathlib import Path

import anyio
import msgspec

from ..adapters.kernel import open_kernel
from ..adapters.notify import tell_ready
from ..adapters.qemu.guest import Timeouts
from ..engine.points import Points, Stage, injector, nowhere
from ..engine.runner import Engine
from ..journal.writer import Journal
from ..states.errors import LuodError
from ..states.names import check_client_id
from .effects import effects
from .freezing import Freezer
from .plan import Changed, Plan
from .vm import Vm
from .wrapper import Wrapper

STATE = Path("/var/lib/luo-qemu")
RUN = Path("/run/luo-qemu")
SOCKET = Path("/run/luod/liveupdate.sock")
FATAL = 70


def parser() -> argparse.ArgumentParser:
    """Return the command line of luo-qemu."""
    cli = argparse.ArgumentParser(
        prog="luo-qemu",
        usage="luo-qemu [OPTION]... -- QEMU [QEMU OPTION]...",
        description="Run a QEMU guest that lives through updates of the host's kernel.",
        epilog="The guest begins anew when luod knows nothing of its name, and goes on where it was after an update.",
    )
    cli.add_argument("--name", help="the guest's id with luod (default: QEMU's -name)")
    cli.add_argument(
        "--socket", type=Path, default=SOCKET, metavar="PATH", help=f"luod's socket (default: {SOCKET})"
    )
    cli.add_argument(
        "--state", type=Path, metavar="DIR", help=f"where the journal is (default: {STATE}/NAME)"
    )
    cli.add_argument(
        "--run", type=Path, metavar="DIR", help=f"where the monitor's socket is (default: {RUN}/NAME)"
    )
    cli.add_argument(
        "--policy", choices=["required", "optional", "best-effort"], default="required",
        help="what the host does when this guest cannot follow an update (default: required, the update is undone)",
    )  # fmt: skip
    cli.add_argument(
        "--order",
        type=int,
        default=0,
        metavar="N",
        help="lower is frozen first and restored last (default: 0)",
    )
    cli.add_argument(
        "--changed", choices=["refuse", "as-saved"], default="refuse",
        help="what becomes of a guest after an update when this command line builds another machine by then: it is not started, or it is "
        "started by the one it was saved with (default: refuse)",
    )  # fmt: skip
    cli.add_argument(
        "--deadline", type=float, metavar="SECONDS", help="how long preserving its memory may take"
    )
    cli.add_argument(
        "--slow",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="multiply all timeouts, for hosts that are emulated themselves",
    )
    cli.add_argument(
        "--kernel",
        choices=["device", "emulated"],
        default="device",
        help="the kernel's device, or an emulator",
    )
    cli.add_argument(
        "--emulator", type=Path, metavar="DIR", help="the emulator's directory, with --kernel emulated"
    )
    cli.add_argument(
        "--volatile",
        action="store_true",
        help="accept a journal that a power cut destroys (tmpfs, overlay, NFS)",
    )
    cli.add_argument(
        "--check",
        action="store_true",
        help="say what becomes of the command line, and whether the guest that runs would come back with it; then end",
    )
    cli.add_argument("--json", action="store_true", help="with --check: as JSON")
    cli.add_argument(
        "--ready-fd",
        type=int,
        metavar="N",
        help="write a byte to this fd when the guest runs and luod knows it",
    )
    cli.add_argument(
        "--crash-at",
        default="",
        metavar="POINT",
        help="fault injection: SIGKILL at the crash point of this name, or that ends so, once",
    )
    cli.add_argument(
        "--crash-trace", type=Path, metavar="FILE", help="fault injection: append each crash point reached"
    )
    cli.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="QEMU", help="QEMU and its options, as usual"
    )
    return cli


def run(argv: list[str] | None = None) -> int:
    """Run luo-qemu; return its exit code."""
    cli = parser()
    args = cli.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        cli.error("name QEMU and its options behind --")
    if args.kernel == "emulated" and args.emulator is None:
        cli.error("--kernel emulated needs --emulator DIR")
    try:
        name = check_client_id(args.name or name_of(command))
        if args.check:
            return check(name, command, args.state or STATE / name, args.changed, as_json=args.json)
        return anyio.run(functools.partial(live, name, command, args), backend="asyncio")
    except LuodError as error:
        return tell(error)
    except BaseExceptionGroup as group:
        found, others = group.split(LuodError)
        if found is None or others is not None:
            raise
        return tell(first_of(found))


def tell(error: LuodError) -> int:
    """Say what went wrong and what to do; return the exit code."""
    print(f"luo-qemu: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    return error.exit_code


def first_of(group: BaseExceptionGroup[LuodError]) -> LuodError:
    """Return the first error of a group."""
    inner = group.exceptions[0]
    return first_of(inner) if isinstance(inner, BaseExceptionGroup) else inner


def name_of(command: list[str]) -> str:
    """Return the name that QEMU's own options give the guest, `vm` where they give none. Raises `NotACommandLine`."""
    from ..adapters.qemu.commandline import lookup, parse, parse_fields

    given = [option.value or "" for option in parse(command[1:]) if option.name == "name"]
    return (lookup(parse_fields(given[-1], "guest"), "guest") if given else None) or "vm"


def check(name: str, command: list[str], state: Path, changed: Changed, *, as_json: bool) -> int:
    """Say what luo-qemu would make of a command line, and whether the guest that runs would come back with it.

    Raises as `rehearse` does, and `ConfigMismatch` for a guest that would not.
    """
    from ..adapters.qemu.errors import ConfigMismatch
    from .rehearsal import rehearse

    found = rehearse(name, command, state, changed)
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(found)).decode() + "\n")
        return 0 if found.comes_back or not found.runs else 1
    for note in found.notes:
        print(f"- {note}")
    print(*found.argv)
    if found.as_saved:
        print(
            f"{name} runs, and would come back as it is; what has changed counts when it is started anew: {'; '.join(found.differences)}"
        )
    elif found.differences:
        raise ConfigMismatch(
            f"{name} runs, and would not come back with this: {'; '.join(found.differences)}",
            hint="it goes on as it is; put the command line right before the next update, or give --changed as-saved",
        )
    elif found.runs:
        print(f"{name} runs, and would come back with this")
    return 0


async def live(name: str, command: list[str], args: argparse.Namespace) -> int:
    """Open what the guest needs, and live with it to the end of its QEMU."""
    state, run_directory = args.state or STATE / name, args.run or RUN / name
    for directory in (state, run_directory):
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise LuodError(
                f"{directory} cannot be made: {error.strerror}", hint="name others by --state and --run"
            ) from None
    kernel = open_kernel(args.kernel, directory=args.emulator)
    boot_id = kernel.boot_id()
    vm = Vm(name, run_directory, kernel, timeouts=Timeouts().scaled(args.slow))
    plan = Plan(command, state, args.changed)
    run_id = os.environ.get("INVOCATION_ID") or f"{os.getpid()}:{uuid.uuid4().hex[:12]}"
    freezers: list[Freezer] = []

    def die(error: BaseException) -> None:
        """End at once: what the journal holds is in doubt. QEMU goes on, and the next luo-qemu adopts it."""
        try:
            for freezer in freezers:
                freezer.rescue()
            print(
                f"luo-qemu: the journal cannot be written: {error}; ending now, QEMU goes on", file=sys.stderr
            )
        finally:
            os._exit(FATAL)

    with Journal.open(
        state / "journal.db", boot_id=boot_id, run_id=run_id, volatile=args.volatile, on_fatal=die
    ) as journal:
        engine = Engine(
            journal, effects(vm, plan), boot_id=boot_id, points=points(args.crash_at, args.crash_trace)
        )
        wrapper = Wrapper(
            engine, vm, plan, args.socket, policy=args.policy, order=args.order, deadline_s=args.deadline,
            ready=functools.partial(tell_ready, args.ready_fd),
        )  # fmt: skip
        freezers.append(wrapper.freezer)
        try:
            return await wrapper.run()
        finally:
            vm.close()


def points(kill_at: str, trace: Path | None) -> Points:
    """Return the crash points of luo-qemu; `kill_at` may be the end of a point's name, for keys hold numbers nobody knows before."""

    def reached(key: str, stage: Stage) -> None:
        name = f"{key}:{stage}"
        injector(name if kill_at and name.endswith(kill_at) else "", trace)(key, stage)

    return reached if kill_at or trace else nowhere


def main() -> None:
    """Entry point of the `luo-qemu` script."""
    sys.exit(run())


if __name__ == "__main__":
    main()
