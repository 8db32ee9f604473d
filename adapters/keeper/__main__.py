# SPDX-License-Identifier: Apache-2.0
"""The `luod-keeper` command."""

from __future__ import annotations

import argparse
import contextlib
import resource
import sys
from pathlib import Path

from ...states.errors import LuodError
from ..kernel import open_kernel
from ..notify import tell_ready
from .server import Keeper, install_signals

RESERVE = 512
"""Descriptors that are not for holding: connections, and fds that have come and are not yet stored."""


class UsageError(LuodError):
    """The command line contradicts itself."""

    exit_code = 2


def parser() -> argparse.ArgumentParser:
    """Return the command line of luod-keeper."""
    cli = argparse.ArgumentParser(prog="luod-keeper", description="Second holder of live-update session fds.")
    cli.add_argument("--dir", type=Path, required=True, help="run directory, shared with luod")
    cli.add_argument("--kernel", choices=["device", "emulated"], default="device")
    cli.add_argument(
        "--emulator", type=Path, metavar="DIR", help="the emulator's directory, with --kernel emulated"
    )
    cli.add_argument("--max", type=int, default=65536, help="how many fds at most (default: %(default)s)")
    cli.add_argument(
        "--ready-fd", type=int, metavar="N", help="write a byte to this fd when the sockets answer"
    )
    return cli


def run(argv: list[str] | None = None) -> int:
    """Hold fds until told to end; return the exit code."""
    args = parser().parse_args(argv)
    try:
        if (args.kernel == "emulated") != (args.emulator is not None):
            raise UsageError("--kernel emulated and --emulator DIR go together")
        limit = min(args.max, descriptors())
        keeper = Keeper(args.dir, open_kernel(args.kernel, directory=args.emulator), limit=limit)
    except (LuodError, OSError) as error:
        print(f"luod-keeper: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, LuodError) else 3
    install_signals(keeper)
    with contextlib.suppress(
        OSError
    ):  # the last to be killed when memory runs out, where that may be asked for
        Path("/proc/self/oom_score_adj").write_text("-900")
    tell_ready(args.ready_fd)
    try:
        keeper.serve()
    finally:
        keeper.close()
    return 0


def descriptors() -> int:
    """Take as many file descriptors as may be had; return how many can be held when some are left for the sockets."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard - min(RESERVE, hard // 2)


def main() -> None:
    """Entry point of the `luod-keeper` script."""
    sys.exit(run())


if __name__ == "__main__":
    main()
