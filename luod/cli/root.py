# SPDX-License-Identifier: Apache-2.0
"""The tree of verbs. A verb's module is imported when the verb is used, so that a look at luod's state stays quick."""

from __future__ import annotations

import difflib
import importlib
from typing import Any, NamedTuple

import click

from .. import __version__

DEFAULT_SOCKET = "/run/luod/liveupdate.sock"


class Verb(NamedTuple):
    """Where a verb lives, and its line in the overview."""

    place: str
    help: str


VERBS: dict[str, Verb] = {
    "status": Verb("looking:status", "The host at a glance: luod, its kernel, its journal, the update."),
    "list": Verb("looking:list_clients", "Who takes part: every client id with its newest session."),
    "sessions": Verb("looking:sessions", "All sessions."),
    "session": Verb("looking:session", "One session: resources, steps, effects, times."),
    "clients": Verb("looking:clients", "Who is connected now."),
    "load": Verb("moving:load", "Load the next kernel."),
    "kexec": Verb("moving:kexec", "Replace the kernel, or go on with an update that waits for a person."),
    "abort": Verb("moving:abort", "Undo the running update, or one session."),
    "wait": Verb("moving:wait", "Wait until the running update has reached its end."),
    "resolve": Verb("moving:resolve", "Settle an effect in doubt."),
    "journal": Verb("journal:journal", "What happened: show, replay, verify, export, timeline, why."),
    "check-config": Verb("settings:check_config", "Check a settings file."),
    "demo": Verb(
        "..demo.command:demo", "A whole update on an emulated kernel; luod killed at any point of it."
    ),
    "lab": Verb("..lab.commands:lab", "Real kernels in QEMU."),
}


class Lazy(click.Group):
    """A group that knows its verbs by name only."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order in which they are needed."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a verb."""
        verb = VERBS.get(cmd_name)
        if verb is None:
            return None
        module, _, name = verb.place.partition(":")
        if not module.startswith("."):
            module = f".{module}"
        command: Any = getattr(importlib.import_module(module, __package__), name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb; a misspelt one is answered with the nearest."""
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], VERBS, 3, 0.5)
            wish = f"; did you mean {' or '.join(near)}?" if near else ""
            raise click.UsageError(f"there is no verb {args[0]!r}{wish}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the overview without importing anything."""
        with formatter.section("Verbs"):
            formatter.write_dl([(name, verb.help) for name, verb in VERBS.items()])


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--socket",
    metavar="PATH",
    envvar="LUOD_SOCKET",
    default=DEFAULT_SOCKET,
    show_default=True,
    help="Luod's socket (also $LUOD_SOCKET).",
)
@click.version_option(__version__, prog_name="luoctl", message="%(prog)s %(version)s")
@click.pass_context
def luoctl(ctx: click.Context, socket: str) -> None:
    """Control, inspect and explain live updates of this host.

    Every verb takes --json. Exit codes: 0 fine, 1 the answer is no, 2 usage, 3 luod or the kernel cannot be reached,
    4 damaged journal, 5 journal of a newer luod.
    """
    ctx.obj = socket
