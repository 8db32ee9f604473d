# SPDX-License-Identifier: Apache-2.0
"""A client of luod in a lab guest: the demo's own client, reporting to the host of the lab.

python -m luod.lab.tenant NAME --run DIR --size BYTES --boot 1|2
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..adapters.kernel import open_kernel
from ..demo.client import DemoClient
from .report import emit, ready


class Tenant(DemoClient):
    """The demo's client; what it reports becomes an event of the lab run, and `subscribed` means it is ready."""

    def report(self, at: str, **more: object) -> None:
        """Tell the host where this client is."""
        emit("client", client=self.name, at=at, **more)
        if at == "subscribed":
            ready()


def main(argv: list[str] | None = None) -> int:
    """Be one client in the first boot (fill, preserve, wait for the jump) or in the second (claim, compare, finish)."""
    parser = argparse.ArgumentParser(prog="luod.lab.tenant")
    parser.add_argument("name")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--boot", type=int, choices=(1, 2), required=True)
    options = parser.parse_args(argv)
    client = Tenant(options.name, options.run / "liveupdate.sock", open_kernel("device"), options.size, -1)
    return client.first_boot() if options.boot == 1 else client.second_boot()


if __name__ == "__main__":
    sys.exit(main())
