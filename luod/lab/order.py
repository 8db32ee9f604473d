# SPDX-License-Identifier: Apache-2.0
"""Order an update in a lab guest, as an operator does: load the next kernel through luod, then have luod jump into it.

    python -m luod.lab.order --run DIR --kernel IMAGE [--append ARGUMENTS] [--clients N]

With `--clients` it waits first until luod knows so many. It follows the update's records until the machine is gone, and ends with 1 when
luod says that there will be no jump.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..client import Client
from ..states.errors import LuodError
from .jump import next_cmdline
from .report import emit

PATIENCE_S = 120.0


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns only when luod did not jump."""
    parser = argparse.ArgumentParser(prog="luod.lab.order")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--kernel", type=Path, required=True)
    parser.add_argument("--append")
    parser.add_argument("--clients", type=int, default=0)
    options = parser.parse_args(argv)
    cmdline = next_cmdline(Path("/proc/cmdline").read_text("utf-8").strip(), options.append)
    try:
        with Client.connect(options.run / "liveupdate.sock", timeout=PATIENCE_S) as luod:
            luod.hello(["progress"])
            luod.load(options.kernel, cmdline=cmdline)
            luod.watch()
            while luod.status()["clients"] < options.clients:
                luod.next_event(PATIENCE_S).close()
            luod.kexec()
            while True:
                record = luod.next_event(PATIENCE_S, names=("PROGRESS",)).fields["record"]
                emit("progress", stream=record["stream"], type=record["type"], body=str(record["body"])[:400])
                if record["type"].startswith("update.aborted."):
                    why = record["body"].get("reason", "")
                    print(f"{record['stream']} was aborted: {why}", file=sys.stderr)
                    return 1
    except LuodError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
