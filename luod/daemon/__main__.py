# SPDX-License-Identifier: Apache-2.0
"""The `luod` command: read the settings, take the journal and the socket, recover, serve.

Exit codes: 0 ended on request, 2 bad settings, 3 another luod or no kernel interface, 4 damaged journal, 5 journal of a newer luod,
70 the journal could not be written (what was being written is in doubt; a restart settles it).
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import signal
import sys
import uuid
from pathlib import Path
from typing import Any, cast

import anyio

from ..adapters.keeper.client import Keeper
from ..adapters.kernel import open_kernel
from ..adapters.notify import tell_ready
from ..engine.points import injector
from ..journal.writer import Journal
from ..states import events as ev
from ..states.errors import LuodError
from .config import Config, load
from .core import Luod
from .recovery import recover
from .server import RunDirectory, Server

log = logging.getLogger("luod")
FATAL = 70


def parser() -> argparse.ArgumentParser:
    """Return the command line of luod."""
    cli = argparse.ArgumentParser(prog="luod", description="Live updates for Linux hosts: the daemon.")
    cli.add_argument(
        "--config", type=Path, help="settings in TOML (default: /etc/luod/luod.toml if it exists)"
    )
    cli.add_argument("--kernel", choices=["device", "emulated"], help="the kernel's device, or an emulator")
    cli.add_argument("--emulator", metavar="DIR", help="the emulator's directory, with --kernel emulated")
    cli.add_argument(
        "--state", metavar="DIR", dest="state_dir", help="where the journal is (default: /var/lib/luod)"
    )
    cli.add_argument("--run", metavar="DIR", dest="run_dir", help="where the socket is (default: /run/luod)")
    cli.add_argument(
        "--volatile",
        action="store_const",
        const=True,
        help="accept a journal that a power cut destroys (tmpfs, overlay, NFS)",
    )
    cli.add_argument("--check-config", action="store_true", help="check the settings and end")
    cli.add_argument(
        "--ready-fd", type=int, metavar="N", help="write a byte to this fd when the socket answers"
    )
    cli.add_argument(
        "--crash-at", default="", metavar="POINT", help="fault injection: SIGKILL at this crash point, once"
    )
    cli.add_argument(
        "--crash-trace", type=Path, metavar="FILE", help="fault injection: append each crash point reached"
    )
    return cli


def run(argv: list[str] | None = None) -> int:
    """Run luod; return its exit code."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="luod: %(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("transitions").setLevel(logging.WARNING)
    overrides: dict[str, Any] = {
        key: getattr(args, key) for key in ("kernel", "emulator", "state_dir", "run_dir", "volatile")
    }
    try:
        config = load(args.config, overrides)
        if args.check_config:
            print("luod: the settings are good")
            return 0
        anyio.run(functools.partial(serve, config, args), backend="asyncio")
    except LuodError as error:
        print(f"luod: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except BaseExceptionGroup as group:
        inner = first_of(group)
        if inner is None:
            raise
        print(f"luod: {inner.message}", file=sys.stderr)
        if inner.hint:
            print(f"hint: {inner.hint}", file=sys.stderr)
        return inner.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def first_of(group: BaseExceptionGroup[BaseException]) -> LuodError | None:
    """Return the error that a person can act on, if all that is in the group are such errors."""
    found: LuodError | None = None
    for error in group.exceptions:
        inner: BaseException | None = error
        if isinstance(error, BaseExceptionGroup):
            inner = first_of(cast("BaseExceptionGroup[BaseException]", error))
        if not isinstance(inner, LuodError):
            return None
        found = found or inner
    return found


def run_identity() -> str:
    """Return the id of this run: systemd's invocation, or pid and a random part."""
    return os.environ.get("INVOCATION_ID") or f"{os.getpid()}:{uuid.uuid4().hex[:12]}"


def die(error: BaseException) -> None:
    """End at once: what the journal holds is in doubt, and nothing may be built on it."""
    try:
        print(f"luod: the journal cannot be written: {error}; ending now", file=sys.stderr, flush=True)
    finally:
        os._exit(FATAL)  # the log may be on the same full disk


async def serve(config: Config, args: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT."""
    run_directory = RunDirectory(Path(config.run_dir))
    try:
        directory = Path(config.emulator) if config.emulator else None
        kernel = open_kernel(
            config.kernel,
            directory=directory,
            held=config.device == "held",
            busy_deadline=config.deadlines.device_s,
        )
        boot_id = kernel.boot_id()
        custody = Keeper(Path(config.run_dir))
        custody.names()
        config.journal_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with Journal.open(
            config.journal_path,
            boot_id=boot_id,
            run_id=run_identity(),
            volatile=config.volatile,
            on_fatal=die,
        ) as journal:
            async with anyio.create_task_group() as group:
                luod = Luod(
                    config, journal=journal, kernel=kernel, custody=custody, group=group, boot_id=boot_id,
                    points=injector(args.crash_at, args.crash_trace),
                )  # fmt: skip
                try:
                    await _serve(luod, run_directory, args, group)
                finally:
                    luod.close()
    finally:
        run_directory.close()


async def _serve(luod: Luod, run_directory: RunDirectory, args: argparse.Namespace, group: Any) -> None:
    server = Server(luod)
    await recover(luod)
    listener = run_directory.listen(luod.config.socket_path)
    group.start_soon(server.serve, listener)
    group.start_soon(_poll, server)
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        tell_ready(args.ready_fd)
        log.info("serving %s, journal %s", luod.config.socket_path, luod.config.journal_path)
        async for number in signals:
            log.info("ending on %s", number.name)
            await luod.engine.record(("luod", ev.DaemonStopped(number.name)))
            break
    group.cancel_scope.cancel()


async def _poll(server: Server) -> None:
    while True:
        await anyio.sleep(server.luod.config.deadlines.poll_s)
        await server.claims.poll()
        await server.luod.ending.expire_unclaimed()
        await server.luod.second_holder.tend()
        if server.luod.journal.checkpoint_due():
            server.luod.checkpoint()


def main() -> None:
    """Entry point of the `luod` script."""
    sys.exit(run())


if __name__ == "__main__":
    main()
