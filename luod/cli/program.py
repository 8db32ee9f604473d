# SPDX-License-Identifier: Apache-2.0
"""The program: finds the verb, runs it, and turns whatever happens into an exit code and at most two lines of text.

Verbs are imported when they are called, so that `luoctl status` loads neither SQLite nor the state machines. `--json` may stand before or
behind the verb: before it, it becomes the default of every `--json` behind.
"""

from __future__ import annotations

import difflib
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import click

from .. import __version__
from ..states.errors import LuodError
from .printing import clean, print_json

DEFAULT_SOCKET = "/run/luod/liveupdate.sock"
USAGE, UNREACHABLE, INTERRUPTED, PIPE_CLOSED = 2, 3, 130, 141
WRONG_ARGUMENT = frozenset({"BAD_FIELD", "BAD_ID", "BAD_IMAGE", "LINE_TOO_LONG"})
NO_KERNEL = frozenset({
    "DEVICE_ABSENT", "DEVICE_DISABLED", "DEVICE_BUSY", "DEVICE_BROKEN", "DEVICE_DENIED",
})  # fmt: skip


class Verb(NamedTuple):
    """Where a verb is, and what the overview says about it."""

    module: str
    attribute: str
    about: str


SECTIONS: dict[str, dict[str, Verb]] = {
    "Look": {
        "list": Verb("luod.cli.look", "list_", "Who takes part, with what."),
        "status": Verb("luod.cli.look", "status", "The host at a glance."),
        "sessions": Verb("luod.cli.look", "sessions", "All sessions that the journal knows."),
        "session": Verb("luod.cli.look", "session", "One session: times, resources, effects."),
        "clients": Verb("luod.cli.look", "clients", "Who is connected."),
    },
    "Act": {
        "load": Verb("luod.cli.act", "load", "Load the next kernel."),
        "kexec": Verb("luod.cli.act", "kexec", "Update: ask all clients, wait for them, jump."),
        "wait": Verb("luod.cli.act", "wait", "Wait until the update has ended."),
        "abort": Verb("luod.cli.act", "abort", "Undo the running update, or one session."),
        "resolve": Verb("luod.cli.act", "resolve", "Settle an effect in doubt."),
        "check-config": Verb("luod.cli.settings", "check_config", "Check a file of settings."),
    },
    "Afterwards": {
        "journal": Verb("luod.cli.journal", "journal", "Read the journal: of luod, of a copy, of an export."),
    },
    "Try": {
        "demo": Verb("luod.demo.command", "demo", "A whole update on an emulated machine."),
        "lab": Verb("luod.lab.commands", "lab", "Real kernels in QEMU."),
    },
}
VERBS = {name: verb for section in SECTIONS.values() for name, verb in section.items()}


class Program(click.Group):
    """The group of all verbs, each loaded when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all verbs."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a verb."""
        verb = VERBS.get(cmd_name)
        if verb is None:
            return None
        command = getattr(importlib.import_module(verb.module), verb.attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb. A name that does not exist is answered with those that look like it."""
        if args and args[0] not in VERBS:
            near = difflib.get_close_matches(args[0], VERBS, 2, 0.5)
            raise Mistaken(
                f"there is no verb {args[0]!r}",
                hint=f"did you mean {' or '.join(near)}?" if near else "`luoctl --help` lists them",
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the overview, without loading a single verb."""
        for title, verbs in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, verb.about) for name, verb in verbs.items()], col_max=14)


class Mistaken(LuodError):
    """A command line that says nothing that luoctl can do."""

    exit_code = USAGE
    code = "USAGE"


def json_everywhere(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    """Make `--json` the default of every verb below."""
    if value:
        default: dict[str, Any] = {"as_json": True}
        default.update(dict.fromkeys(VERBS, default))
        default.update(dict.fromkeys(
            ("show", "replay", "verify", "export", "timeline", "why", "build-kernel", "kernels"), default
        ))  # fmt: skip
        ctx.default_map = default
    return value


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--socket", metavar="PATH", default=DEFAULT_SOCKET, envvar="LUOD_SOCKET", show_default=True,
    help="The socket of luod; also $LUOD_SOCKET.",
)  # fmt: skip
@click.option(
    "--json", is_flag=True, expose_value=False, is_eager=True, callback=json_everywhere,
    help="Print JSON; also behind the verb.",
)  # fmt: skip
@click.version_option(__version__, prog_name="luoctl", message="%(prog)s %(version)s")
@click.pass_context
def program(ctx: click.Context, socket: str) -> None:
    """Control live updates of this host, look into them, and find out afterwards what happened.

    Exit codes: 0 fine, 1 the answer is no, 2 usage, 3 cannot reach luod or the kernel, 4 damaged journal, 5 journal of a newer luod.
    """
    ctx.obj = socket


def run(argv: Sequence[str]) -> int:
    """Run luoctl; return its exit code. Nothing that goes wrong on purpose is raised."""
    args = list(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if "_LUOCTL_COMPLETE" in os.environ:
        program.main(args, prog_name="luoctl")
    before = args[: args.index("--")] if "--" in args else args
    as_json = "--json" in before
    try:
        try:
            with program.make_context("luoctl", args) as context:
                program.invoke(context)
            code = 0
        except LuodError as error:
            code = report(error, as_json)
        except click.exceptions.Exit as end:
            code = end.exit_code
        except click.UsageError as error:
            code = report(mistaken(error), as_json)
        except click.ClickException as error:
            code = report(Mistaken(error.format_message()), as_json)
        except UnicodeEncodeError as error:
            shown = error.object.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            wrong = Mistaken(f"{shown[:80]!r} is not UTF-8", hint="names and texts must be")
            code = report(wrong, as_json)
        except (KeyboardInterrupt, click.Abort):
            code = INTERRUPTED
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        _forget_output()
        code = PIPE_CLOSED
    except KeyboardInterrupt:
        code = INTERRUPTED
    return code


def mistaken(error: click.UsageError) -> Mistaken:
    """Say what is wrong with a command line, in luoctl's own way."""
    path = error.ctx.command_path if error.ctx is not None else "luoctl"
    if isinstance(error, click.exceptions.NoArgsIsHelpError) or error.message == "Missing command.":
        return Mistaken("a verb is missing", hint=f"`{path} --help` lists them")
    text = error.format_message().rstrip(".")
    return Mistaken(text[:1].lower() + text[1:], hint=f"`{path} --help`")


def code_of(error: LuodError) -> str:
    """Return the stable code of an error: luod's own, or the name of its class in the same style."""
    given = str(getattr(error, "code", "") or type(error).__name__)
    return (
        given
        if given.isupper()
        else re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", given).upper()
    )


def exit_code_of(error: LuodError) -> int:
    """Return what luoctl ends with; what luod refuses is "no", unless the argument itself is wrong or the kernel is away."""
    code = code_of(error)
    if code in WRONG_ARGUMENT:
        return USAGE
    if code in NO_KERNEL:
        return UNREACHABLE
    return error.exit_code


def report(error: LuodError, as_json: bool) -> int:
    """Tell about an error and return the exit code."""
    if as_json:
        body = {"code": code_of(error), "message": error.message, "hint": error.hint}
        if number := getattr(error, "errno", None):
            import errno

            body["errno"] = (
                errno.errorcode.get(number, str(number)) if isinstance(number, int) else str(number)
            )
        print_json({"error": body})
    else:
        click.echo(f"luoctl: {clean(error.message)}", err=True)
        if error.hint:
            click.echo(f"hint: {clean(error.hint)}", err=True)
    return exit_code_of(error)


def no(code: int = 1) -> NoReturn:
    """End with an exit code, when everything has been said."""
    raise click.exceptions.Exit(code)


def _forget_output() -> None:
    """Nobody reads any more: what is still buffered must not raise again when Python ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
