# SPDX-License-Identifier: Apache-2.0
"""`luoctl`: control, inspection and post-mortem of live updates.

Exit codes: 0 fine, 1 the answer is no, 2 usage, 3 luod or the kernel cannot be reached, 4 damaged journal, 5 newer schema, 130 on
Ctrl-C, 141 when whoever read the output has gone. Every mistake is one line `luoctl: what` and one `hint: what to do`, never a
traceback; with `--json` it is an object `{"error": {...}}` on standard output.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from ..states.errors import LuodError

INTERRUPTED = 130
PIPE_CLOSED = 141
USAGE_CODES = frozenset({"BAD_FIELD", "BAD_ID", "BAD_IMAGE", "BAD_VERSION", "LINE_TOO_LONG"})
"""What luod refuses because of how it was asked."""


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: that of the process); return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in words
    import click

    from .root import luoctl

    try:
        code = luoctl.main(words, prog_name="luoctl", standalone_mode=False)
        sys.stdout.flush()
    except LuodError as error:
        return report(error, as_json)
    except click.UsageError as error:
        return _usage(error, as_json)
    except click.ClickException as error:
        return report(LuodError(error.format_message()), as_json)
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)  # what is still buffered goes nowhere
        return PIPE_CLOSED
    return code if isinstance(code, int) else 0


def report(error: LuodError, as_json: bool) -> int:
    """Say what went wrong and what to do; return the exit code."""
    code = str(getattr(error, "code", "") or type(error).__name__)
    exit_code = 2 if code in USAGE_CODES else error.exit_code
    if as_json:
        body: dict[str, object] = {
            "code": code,
            "message": error.message,
            "hint": error.hint,
            "exit": exit_code,
        }
        if number := errno_of(error):
            body["errno"] = number
        print(json.dumps({"error": body}), flush=True)
        return exit_code
    print(f"luoctl: {error.message.rstrip()}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    return exit_code


def errno_of(error: LuodError) -> str:
    """Return the symbolic errno that an error carries, or the empty text."""
    import errno

    number = getattr(error, "errno", "")
    return (
        errno.errorcode.get(number, str(number)) if isinstance(number, int) and number else str(number or "")
    )


def _usage(error: object, as_json: bool) -> int:
    import click

    assert isinstance(error, click.UsageError)
    command = error.ctx.command_path if error.ctx is not None else "luoctl"
    problem = LuodError(error.format_message().rstrip("."), hint=f"`{command} --help` shows how it is used")
    problem.exit_code = 2  # type: ignore[misc]
    if as_json:
        problem.code = "USAGE"  # type: ignore[attr-defined]
    return report(problem, as_json)


def main() -> None:
    """Entry point of the `luoctl` script."""
    sys.exit(run())
