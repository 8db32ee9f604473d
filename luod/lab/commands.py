# SPDX-License-Identifier: Apache-2.0
"""`luoctl lab`: build kernels for the lab, list them, boot one and run its tests.

The functions do the work and return plain data; the click commands only parse and print. Errors are `LuodError`s, which the program
that carries this group turns into messages and exit codes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from .build import DEFAULT_VERSION, build_kernel
from .errors import LabRunFailed, LabUnavailable
from .images import KERNELS_VARIABLE, KernelImage, available, choose_pair, find_image, kernels_directory
from .machine import Machine
from .outcome import LabRun
from .progress import reporter
from .qemus import SUITES, fetch_qemu
from .script import DEFAULT_ARGUMENTS, REPOSITORY, Boot, run


def describe(image: KernelImage) -> dict[str, str]:
    """Return what `--json` says about an image."""
    return {"version": image.version, "release": image.release, "path": str(image.path)}


def lab_build_kernel(
    version: str = DEFAULT_VERSION, *, suite: str | None = None, jobs: int | None = None, keep: bool = False
) -> KernelImage:
    """Build a kernel into the user's cache, showing progress on standard error. Raises `LabUnavailable` and `BuildFailed`."""
    with reporter() as progress:
        return build_kernel(version, suite=suite, jobs=jobs, keep=keep, progress=progress)


def lab_boot(
    command: Sequence[str],
    *,
    kernel: str | None = None,
    arguments: str = DEFAULT_ARGUMENTS,
    directory: Path | None = None,
    timeout_s: float = 120.0,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> LabRun:
    """Boot a kernel, run one command in it and power off. The command sees the host's files, read-only.

    The run's files stay in `directory`, or in a new temporary directory.
    """
    place = directory or Path(tempfile.mkdtemp(prefix="luod-lab-"))
    step = run("command", command, directory=str(Path.cwd()), timeout_s=timeout_s)
    boot = Boot([step], arguments=arguments)
    return Machine(find_image(kernel), place).run([boot], timeout_s=timeout_s + 30, on_event=on_event)


def lab_test(arguments: Sequence[str] = ()) -> int:
    """Run the tests that need real kernels and return pytest's exit code. Raises `LabUnavailable` outside a checkout."""
    if not (REPOSITORY / "tests" / "lab").is_dir():
        raise LabUnavailable(
            "the lab's tests are not here: they come with the source tree",
            hint="run this in a checkout of luod",
        )
    command = [sys.executable, "-m", "pytest", "-m", "lab", "tests/lab", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, check=False).returncode


@click.group("lab")
def lab() -> None:
    """Real kernels in QEMU: build, boot, update, test."""


@lab.command("build-kernel")
@click.option(
    "--version",
    default=DEFAULT_VERSION,
    show_default=True,
    help="Linux version: X.Y, or X.Y.Z to insist on one.",
)
@click.option("--suite", help="Debian suite to take linux-source-X.Y from; otherwise it is searched.")
@click.option(
    "--jobs", "-j", type=click.IntRange(1), help="Compilers at once; otherwise one for each processor."
)
@click.option("--keep", is_flag=True, help="Keep the source tree (3 GB) for the next build.")
@click.option("--json", "as_json", is_flag=True, help="Print the image as a JSON object.")
def build_kernel_command(
    version: str, suite: str | None, jobs: int | None, keep: bool, as_json: bool
) -> None:
    """Build a kernel with live update from Debian's source package. No root needed; an interrupted build continues."""
    image = lab_build_kernel(version, suite=suite, jobs=jobs, keep=keep)
    click.echo(json.dumps(describe(image)) if as_json else str(image.path))


@lab.command("kernels")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def kernels_command(as_json: bool) -> None:
    """List the kernels that the lab can boot. Exit code 1 when there is none."""
    images = available()
    if as_json:
        click.echo(json.dumps([describe(image) for image in images]))
    elif images:
        for image in images:
            click.echo(f"{image.version}\t{image.release}\t{image.path}")
    else:
        click.echo(
            f"no kernels in {kernels_directory()}: run `luoctl lab build-kernel` or set {KERNELS_VARIABLE}",
            err=True,
        )
    if not images:
        raise click.exceptions.Exit(1)


@lab.command("fetch-qemu")
@click.option(
    "--suites",
    default=SUITES,
    show_default=True,
    help="Debian suites, the one to take QEMU from last.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the QEMU as a JSON object.")
def fetch_qemu_command(suites: str, as_json: bool) -> None:
    """Fetch a newer QEMU into the cache, so that guests can be updated from the installed one to it. No root needed."""
    found = fetch_qemu(suites=suites)
    told = {"version": found.version, "binary": str(found.binary)}
    click.echo(json.dumps(told) if as_json else f"{found.version}\t{found.binary}")


@lab.command("boot", context_settings={"ignore_unknown_options": True})
@click.option("--kernel", metavar="VERSION|FILE", help="Kernel to boot; otherwise the newest.")
@click.option("--append", "arguments", default=DEFAULT_ARGUMENTS, show_default=True, help="Kernel arguments.")
@click.option(
    "--timeout", "timeout_s", type=float, default=120.0, show_default=True, help="Seconds for the command."
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Directory for console log and results; it is emptied."
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def boot_command(
    kernel: str | None, arguments: str, timeout_s: float, out: Path | None, command: tuple[str, ...]
) -> None:
    """Boot a kernel and run COMMAND in it, as root, with the host's files read-only. Ends with the command's exit code."""
    program = command if os.path.sep in command[0] else ("/usr/bin/env", *command)
    result = lab_boot(program, kernel=kernel, arguments=arguments, timeout_s=timeout_s, directory=out)
    outcome = next((event for event in result.of("step")), None)
    if outcome is None or outcome.get("code") is None:
        raise LabRunFailed(
            result.problem() or "the command did not run",
            hint=f"everything about this run is in {result.directory}",
        )
    click.echo((result.state / "lab" / "0-command.out").read_text("utf-8", "replace"), nl=False)
    if out is None:
        shutil.rmtree(result.directory)
    raise click.exceptions.Exit(int(outcome["code"]) if outcome["code"] >= 0 else 128 - int(outcome["code"]))


@lab.command("demo")
@click.option("--kernel", metavar="VERSION|FILE", help="Kernel to start from; otherwise the oldest there is.")
@click.option(
    "--next-kernel", metavar="VERSION|FILE", help="Kernel to update to; otherwise the newest there is."
)
@click.option(
    "--sessions",
    "clients",
    type=click.IntRange(1, 64),
    default=3,
    show_default=True,
    help="How many clients, or guests.",
)
@click.option("--qemu", is_flag=True, help="Real QEMU guests in the lab machine, as clients.")
@click.option(
    "--size",
    "size_mib",
    type=click.IntRange(1, 256),
    default=16,
    show_default=True,
    help="MiB of memory of each.",
)
@click.option(
    "--crash",
    type=click.Choice(["all"]),
    help="Kill luod at every crash point, and restart it; takes minutes.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Keep consoles, journals and timeline here.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as a JSON object.")
def demo_command(
    kernel: str | None,
    next_kernel: str | None,
    clients: int,
    qemu: bool,
    size_mib: int,
    crash: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Update a real kernel to another with luod and its clients, and check every byte. Takes a minute or two."""
    from .update import MIB, lab_demo

    if qemu:
        if crash:
            raise click.UsageError("--crash kills luod under the demo's own clients: leave out --qemu")
        _demo_guests(kernel, next_kernel, clients, out, as_json)
    old, new = choose_pair(kernel, next_kernel)
    place = out or Path(tempfile.mkdtemp(prefix="luod-lab-demo-"))
    on_event = None if as_json else _tell
    told, done = lab_demo(
        old, new, place, clients=clients, size=size_mib * MIB, crash=crash is not None, on_event=on_event
    )
    right = (
        told["finished"] == told["sessions"] == clients and told["bytes_verified"] == clients * size_mib * MIB
    )
    if as_json:
        click.echo(json.dumps(told))
    else:
        click.echo((done.directory / "timeline.txt").read_text("utf-8"))
        compared = f"{told['bytes_verified'] // MIB} MiB compared"
        click.echo(
            f"{told['kernel']}: {told['finished']} of {told['sessions']} sessions finished, {compared}"
        )
        if crash:
            click.echo(f"luod died at {told['crash_points']} points and came back {told['recoveries']} times")
        click.echo(f"consoles, journals and timeline are in {done.directory}")
    raise click.exceptions.Exit(0 if right else 1)


def _demo_guests(
    kernel: str | None, next_kernel: str | None, guests: int, out: Path | None, as_json: bool
) -> NoReturn:
    from ..demo.guests import draw_guests
    from .guests import GUEST_MIB, guest_reports, lab_guests

    old, new = choose_pair(kernel, next_kernel)
    place = out or Path(tempfile.mkdtemp(prefix="luod-lab-demo-"))
    told, done = lab_guests(old, new, place, guests=guests, on_event=None if as_json else _tell)
    right = told["finished"] == guests and not told["detail"]["problems"]
    if as_json:
        click.echo(json.dumps(told))
    else:
        click.echo((done.directory / "timeline.txt").read_text("utf-8"))
        click.echo(draw_guests(guest_reports(done, guests, GUEST_MIB << 20)), nl=False)
        click.echo(f"{told['kernel']}: {told['finished']} of {guests} guests finished")
        click.echo(f"consoles, serial logs, journals and timeline are in {done.directory}")
    raise click.exceptions.Exit(0 if right else 1)


def _tell(event: dict[str, Any]) -> None:
    """Print one line for what a person wants to see of a run."""
    match event["event"]:
        case "boot":
            handover = ", with a handover" if event["handover"] else ""
            click.echo(f"boot {event['boot']}: Linux {event['kernel']}{handover}", err=True)
        case "client":
            click.echo(f"  {event['client']} {event['at']}", err=True)
        case "crash":
            click.echo(f"  luod dies at {event['side']}:{event['point'].partition(':')[2]}", err=True)
        case "guest":
            click.echo(f"  {event['name']} at tick {event['last']}, pass {event['passes']}", err=True)
        case "leave":
            click.echo("  the update is ordered", err=True)
        case "step" if event["step"] in ("keeper", "luod"):
            click.echo(f"  {event['step']} is up", err=True)
        case _:
            pass


@lab.command("test", context_settings={"ignore_unknown_options": True})
@click.argument("pytest_arguments", nargs=-1, type=click.UNPROCESSED)
def test_command(pytest_arguments: tuple[str, ...]) -> None:
    """Run the tests on real kernels. More arguments go to pytest."""
    raise click.exceptions.Exit(lab_test(pytest_arguments))
