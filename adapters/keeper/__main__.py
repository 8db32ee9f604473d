# SPDX-License-Identifier: Apache-2.0
"""The `luod-keeper` command."""

from __future__ import annotations

import argparse
import os
import resource
import socket
import sys
from pathlib import Path

from ...states.errors import LuodError
from ..kernel import open_kernel
from .server import Keeper, install_signals


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
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        if (args.kernel == "emulated") != (args.emulator is not None):
            raise LuodError("--kernel emulated and --emulator DIR go together")
        keeper = Keeper(args.dir, open_kernel(args.kernel, directory=args.emulator), limit=args.max)
    except (LuodError, OSError) as error:
        print(f"luod-keeper: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, LuodError) else 3
    install_signals(keeper)
    if args.ready_fd is not None:
        os.write(args.ready_fd, b"\n")
        os.close(args.ready_fd)
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto(b"READY=1", "\0" + address[1:] if address.startswith("@") else address)
    try:
        keeper.serve()
    finally:
        keeper.close()
    return 0


def main() -> None:
    """Entry point of the `luod-keeper` script."""
    sys.exit(run())


if __name__ == "__main__":
    main()
