# SPDX-License-Identifier: Apache-2.0
"""`python -m luod.adapters.emulator --dir D`: be the kernel of a small world until told to stop.

Ends on SHUTDOWN, on SIGTERM, and when the lifeline pipe of the process that started it closes.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib
import os
import resource
import signal
import sys
from pathlib import Path

from .board import Board
from .desk import Desk
from .handlers import HandlerRegistry
from .images import KernelImage, read_image
from .machine import Machine
from .pci_function import DeviceOption
from .server import KernelServer

DEFAULT_CMDLINE = "liveupdate=on kho=on"
_FILES = 1 << 18


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < _FILES:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, _FILES))
            return
        except (ValueError, OSError):
            pass  # not root: what the hard limit gives has to do
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, max(soft, _FILES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _load_handlers(names: list[str], board: Board) -> HandlerRegistry:
    registry = HandlerRegistry(board)
    for name in names:
        module, _, attribute = name.partition(":")
        getattr(importlib.import_module(module), attribute)(registry)
    return registry


def main(argv: list[str] | None = None) -> int:
    """Run the emulator; returns the exit status: 0 when told to stop, 3 when the directory is taken."""
    parser = argparse.ArgumentParser(
        prog="luod-emulator", description="A kernel with live update, in user space."
    )
    parser.add_argument("--dir", type=Path, required=True, help="directory for the sockets; made if missing")
    parser.add_argument("--cmdline", default=DEFAULT_CMDLINE, help="command line of the first kernel")
    parser.add_argument(
        "--image", type=Path, help="image of the first kernel (default: one like Linux 7.3.4)"
    )
    parser.add_argument(
        "--handler",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="call FUNCTION(registry) to add file handlers",
    )
    parser.add_argument(
        "--device",
        action="append",
        default=[],
        metavar="NAME[,bdf=B][,driver=D][,vf][,noiommu]",
        help="plug in a PCI device, whose node is /dev/vfio/devices/NAME while its driver is vfio-pci (the default)",
    )
    parser.add_argument("--ready-fd", type=int, help="write a line here when the sockets are there")
    parser.add_argument("--lifeline-fd", type=int, help="end when this pipe is closed at the other end")
    args = parser.parse_args(argv)
    try:
        options = [DeviceOption.parse(text, number) for number, text in enumerate(args.device)]
        board = Board.of(options)
    except ValueError as error:
        parser.error(str(error))
    _raise_file_limit()
    os.umask(0o077)
    args.dir.mkdir(parents=True, exist_ok=True)
    lock = os.open(args.dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{parser.prog}: another emulator serves {args.dir}; stop it first", file=sys.stderr)
        return 3
    image = KernelImage()
    if args.image:
        with open(args.image, "rb") as file:
            image = read_image(file.fileno())
    server = KernelServer(args.dir, Machine(image, args.cmdline, _load_handlers(args.handler, board)))
    desk = Desk(server)

    def stop(*_: object) -> None:
        server.running = False

    wake, wake_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake_end)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    server.watch(wake, stop)
    if args.lifeline_fd is not None:
        server.watch(args.lifeline_fd, stop)
    if args.ready_fd is not None:
        os.write(args.ready_fd, b"ready\n")
        os.close(args.ready_fd)
    try:
        server.run(desk.settle)
    finally:
        desk.close()
        server.close()
        os.close(wake)
        os.close(wake_end)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
