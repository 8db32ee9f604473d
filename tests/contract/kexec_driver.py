# SPDX-License-Identifier: Apache-2.0
"""Run one stage of the cases across kexecs.

    python kexec_driver.py --stage 1 --backend device [--only k20,x15] [--kexec IMAGE --cmdline TEXT | --hold]
    python kexec_driver.py --stage 2 --backend device ...

One line a case: `ok NAME` or `FAIL NAME DETAIL`; then `done stage N: P passed, F failed`; exit status 1 if any failed. With --hold a
child process keeps the sessions until the kexec, which the caller then does; with --kexec this process loads the image and jumps
(and never returns if that works). Stages run from 1 to 3, with one kexec before each but the first. Nothing is kept in files.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import cases_kexec
from contract_world import World

from luod.engine.ports import KexecImage
from luod.states.errors import LuodError


def selected(only: str) -> list[str]:
    """The cases that were asked for, by the beginnings of their names; all that are safe if none were."""
    names = list(cases_kexec.cases())
    if not only:
        return [name for name in names if name not in cases_kexec.BY_NAME_ONLY]
    wanted = [part for part in only.split(",") if part]
    for part in wanted:
        if not any(name.startswith(part) for name in names):
            raise SystemExit(f"no such case: {part}")
    return [name for name in names if name.startswith(tuple(wanted))]


def run_stage(world: World, stage: int, names: list[str]) -> int:
    """Run that stage of the cases; returns how many failed."""
    failed = passed = 0
    table = cases_kexec.cases()
    for name in names:
        function = table[name].get(stage)
        if function is None:
            continue
        try:
            function(world)
        except (AssertionError, OSError, LuodError) as error:
            failed += 1
            where = traceback.extract_tb(error.__traceback__)
            place = next(
                (frame for frame in reversed(where) if frame.filename == cases_kexec.__file__), where[-1]
            )
            detail = f"{type(error).__name__}: {error} at line {place.lineno}: {place.line}"
            print("FAIL", name, " ".join(detail.split()), flush=True)
        else:
            passed += 1
            print("ok", name, flush=True)
        finally:
            world.end_case()
    print(f"done stage {stage}: {passed} passed, {failed} failed", flush=True)
    return failed


def hold(world: World) -> None:
    """Leave a child behind that keeps the session fds, as long as this boot lasts."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        for fd in world.kept_sessions[:1]:
            world.kernel.session_name(fd)  # the emulator learns of this process by a call
        os.write(tell, b"x")
        os.close(tell)
        while True:
            signal.pause()
    os.close(tell)
    if os.read(told, 1) != b"x":
        raise SystemExit("the holder of the sessions ended")
    os.close(told)
    print("holder", child, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run a stage; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", type=int, choices=range(1, cases_kexec.STAGES + 1))
    parser.add_argument("--backend", choices=("device", "emulated"), default="device")
    parser.add_argument("--dir", type=Path, help="directory of the emulator")
    parser.add_argument("--only", default="", help="cases by the beginnings of their names, with commas")
    parser.add_argument("--hold", action="store_true", help="leave a process that keeps the sessions")
    parser.add_argument(
        "--kexec", type=Path, metavar="IMAGE", help="load this kernel and jump, if no case failed"
    )
    parser.add_argument("--cmdline", default="", help="command line of that kernel")
    parser.add_argument("--list", action="store_true", help="name the cases and their stages")
    args = parser.parse_args(argv)
    names = selected(args.only)
    if args.list:
        for name in names:
            print(name, *sorted(cases_kexec.cases()[name]))
        return 0
    if args.stage is None:
        parser.error("--stage is needed")
    world = World(args.backend, args.dir)
    failed = run_stage(world, args.stage, names)
    if args.kexec is not None and not failed:
        world.kernel.load(KexecImage(args.kexec, None, args.cmdline))
        world.kernel.kexec()
    if args.hold:
        hold(world)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
