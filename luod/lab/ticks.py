# SPDX-License-Identifier: Apache-2.0
"""Wait in a lab machine for what its guests say: so many ticks each, or a whole check of their memory since the update.

    python -m luod.lab.ticks mark  --serials DIR --guests N --marks FILE
    python -m luod.lab.ticks until --serials DIR --guests N --ticks T [--marks FILE]

`mark` writes down how far each guest has come; `until --marks` waits until each has come further and has been over its memory twice.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..demo.guests import SerialPort
from ..states.errors import LuodError
from .report import emit

PATIENCE_S = 480.0


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="luod.lab.ticks")
    parser.add_argument("what", choices=("mark", "until"))
    parser.add_argument("--serials", type=Path, required=True)
    parser.add_argument("--guests", type=int, required=True)
    parser.add_argument("--ticks", type=int, default=1)
    parser.add_argument("--marks", type=Path)
    options = parser.parse_args(argv)
    ports = [
        SerialPort(options.serials / f"vm{number}.serial", number + 1) for number in range(options.guests)
    ]
    if options.what == "mark":
        marks = [[log.last, log.passes] for log in (port.look() for port in ports)]
        options.marks.write_text(json.dumps(marks), "ascii")
        emit("marks", marks=marks)
        return 0
    marks = json.loads(options.marks.read_text("ascii")) if options.marks else [[0, -2]] * options.guests
    try:
        for port, (last, passes) in zip(ports, marks, strict=True):
            log = port.until_tick(last + options.ticks, passes + 2, PATIENCE_S)
            emit("guest", name=port.path.stem, last=log.last, passes=log.passes, findings=log.findings[:5])
    except LuodError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
