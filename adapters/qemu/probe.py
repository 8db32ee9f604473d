# SPDX-License-Identifier: Apache-2.0
"""What a QEMU binary can do, asked of the binary itself.

Versions say little: distributions backport, builds leave things out, and the way RAM can be opened was changed back and forth. So the
binary is started once without a machine (`-machine none`), asked over QMP, and made to open a memfd in both ways. That costs about 0.1 s,
and is kept for as long as the binary is the same file.

    QemuUnusable
      QemuMissing      there is no such program, or it may not be executed
      NotQemu          it ran, but is not QEMU
      QemuTooOld       it cannot leave shared RAM where it is over a restart
      MachineUnknown   it does not know that machine type
      MachineUnversioned  the machine type may be another machine in another QEMU
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ...states.errors import LuodError
from .. import memfd

ANSWER_S = 20.0
"""How long a binary may take to answer, in seconds; 0.1 s is usual."""
_PAGE = 4096


class QemuUnusable(LuodError):
    """A QEMU binary that cannot carry a guest over a kexec. `errno` is symbolic."""

    errno = "ENOEXEC"


class QemuMissing(QemuUnusable):
    """There is no such program, or it may not be executed."""

    errno = "ENOENT"


class NotQemu(QemuUnusable):
    """The program ran, but does not speak as QEMU does."""


class QemuTooOld(QemuUnusable):
    """The binary has no cpr-reboot, or no x-ignore-shared."""

    errno = "EOPNOTSUPP"


class MachineUnknown(QemuUnusable):
    """The binary does not know a machine type."""

    errno = "EOPNOTSUPP"


class MachineUnversioned(QemuUnusable):
    """A machine type without a version: in another QEMU it may be another machine."""

    errno = "EINVAL"


class Capabilities(msgspec.Struct, frozen=True):
    """What one binary can do.

    `machines` are the names of its machine types, `aliases` map a short name to one of them (`q35` to `pc-q35-10.0`), `default_cpus` give
    the CPU model that each machine type has by default. `fragile_cpus` are the models whose meaning depends on the host (`host`, `max`).
    `ram_by_fdset` says whether RAM can be opened as /dev/fdset/N; /proc/self/fd/N always works, else there would be no capabilities.
    """

    path: str
    version: str
    machines: tuple[str, ...]
    aliases: dict[str, str]
    default_machine: str
    default_cpus: dict[str, str]
    cpus: tuple[str, ...]
    fragile_cpus: tuple[str, ...]
    ram_by_fdset: bool

    def pin(self, machine: str) -> str:
        """Return the versioned machine type that a name stands for in this binary.

        Raises `MachineUnknown`, and `MachineUnversioned` for a type that has no versions at all, as `microvm`.
        """
        name = self.aliases.get(machine or self.default_machine, machine or self.default_machine)
        if name not in self.machines:
            raise MachineUnknown(
                f"{self.path} (version {self.version}) has no machine type {machine!r}",
                hint=f"`{self.path} -machine help` lists those it has; a newer QEMU keeps the types of older ones for some years",
            )
        if not versioned(name):
            raise MachineUnversioned(
                f"machine type {name!r} has no versions, so no other QEMU need build the same machine",
                hint="use a versioned one: " + ", ".join(sorted(self.aliases)) if self.aliases else "",
            )
        return name


def versioned(machine: str) -> bool:
    """Say whether the name of a machine type ends with the QEMU version whose machine it is, as `pc-q35-10.0` does."""
    major, dot, minor = machine.rpartition("-")[2].partition(".")
    return bool(dot) and major.isdigit() and minor.isdigit()


def locate(binary: str) -> Path:
    """Return the file that a command name or path stands for. Raises `QemuMissing`."""
    found = shutil.which(binary)
    if found is None:
        there = Path(binary).exists() if "/" in binary else False
        raise QemuMissing(
            f"{binary}: {'it may not be executed' if there else 'there is no such program'}",
            hint="install QEMU (10.0 or newer is known to work), or name its binary by its path",
        )
    return Path(found).resolve()


def probe(binary: str, *, cache: Path | None = None, timeout_s: float = ANSWER_S) -> Capabilities:
    """Return what a binary can do. `cache` is a directory in which answers are kept.

    Raises `QemuMissing`, `NotQemu` and `QemuTooOld`.
    """
    path = locate(binary)
    kept = cache / f"probe-{_identity(path)}.json" if cache is not None else None
    if kept is not None and (known := _known(kept)) is not None:
        return known
    found = _ask(path, timeout_s)
    if kept is not None:
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_bytes(msgspec.json.encode(found))
        part.rename(kept)
    return found


def _identity(path: Path) -> str:
    """Name a binary by what changes when it is replaced."""
    facts = path.stat()
    text = f"{path} {facts.st_dev} {facts.st_ino} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _known(kept: Path) -> Capabilities | None:
    try:
        return msgspec.json.decode(kept.read_bytes(), type=Capabilities)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _ask(path: Path, timeout_s: float) -> Capabilities:
    by_set, by_number = memfd.create("probe", _PAGE), memfd.create("probe", _PAGE)
    try:
        answers = converse(
            path,
            ["-accel", "tcg", "-add-fd", f"fd={by_set},set=1"],
            [
                ("query-version", {}),
                ("query-machines", {}),
                ("query-cpu-definitions", {}),
                ("query-qmp-schema", {}),
                ("object-add", _backend("s", "/dev/fdset/1")),
                ("object-add", _backend("n", f"/proc/self/fd/{by_number}")),
            ],
            fds=(by_set, by_number),
            timeout_s=timeout_s,
        )
    finally:
        os.close(by_set)
        os.close(by_number)
    return _capabilities(path, answers)


def _backend(name: str, place: str) -> dict[str, Any]:
    return {
        "qom-type": "memory-backend-file",
        "id": name,
        "size": _PAGE,
        "share": True,
        "mem-path": place,
    }


def _capabilities(path: Path, answers: Sequence[Mapping[str, Any]]) -> Capabilities:
    version, machines, cpus, schema, by_set, by_number = answers
    try:
        number = version["return"]["qemu"]
        text = f"{number['major']}.{number['minor']}.{number['micro']}"
        words = _enum_words(schema["return"])
    except (KeyError, TypeError):
        raise NotQemu(f"{path} answers QMP, but not as a QEMU does", hint="is it a wrapper script?") from None
    missing = [
        what
        for word, what in (
            ("cpr-reboot", "the migration mode cpr-reboot (QEMU 8.2)"),
            ("x-ignore-shared", "the migration capability x-ignore-shared (QEMU 3.1)"),
        )
        if word not in words
    ]
    if missing:
        raise QemuTooOld(
            f"{path} (version {text}) is too old: it has not {' nor '.join(missing)}",
            hint="install QEMU 10.0 or newer (Debian 12 has it in bookworm-backports)",
        )
    if "error" in by_number:
        raise QemuUnusable(
            f"{path} (version {text}) cannot open RAM as /proc/self/fd/N: {by_number['error']['desc']}",
            hint="is /proc mounted, and memory-backend-file built in?",
        )
    types: list[dict[str, Any]] = machines["return"]
    models: list[dict[str, Any]] = cpus.get("return", [])
    return Capabilities(
        path=str(path),
        version=text,
        machines=tuple(sorted(one["name"] for one in types)),
        aliases={one["alias"]: one["name"] for one in types if "alias" in one},
        default_machine=next((one["name"] for one in types if one.get("is-default")), ""),
        default_cpus={
            one["name"]: _model(one["default-cpu-type"]) for one in types if "default-cpu-type" in one
        },
        cpus=tuple(sorted(one["name"] for one in models)),
        fragile_cpus=tuple(sorted(one["name"] for one in models if not one.get("migration-safe"))),
        ram_by_fdset="error" not in by_set,
    )


def _enum_words(schema: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return every word of every enumeration in a QMP schema."""
    return {word for one in schema if one["meta-type"] == "enum" for word in one["values"]}


def _model(cpu_type: str) -> str:
    """Return the name by which `-cpu` knows a CPU type: `qemu64` for `qemu64-x86_64-cpu`."""
    return cpu_type.removesuffix("-cpu").rpartition("-")[0] or cpu_type


def features(
    binary: Path, accelerators: Sequence[str], model: str, *, timeout_s: float = ANSWER_S
) -> tuple[str, ...]:
    """Return what a CPU model is on this host with this binary: the features that are on, and the properties that have values.

    Raises `QemuUnusable` when the binary cannot tell, for example because there is no KVM for `host`.
    """
    accelerator = [word for each in accelerators for word in ("-accel", each)]
    (answer,) = converse(
        binary,
        accelerator or ["-accel", "tcg"],
        [("query-cpu-model-expansion", {"type": "full", "model": {"name": model}})],
        timeout_s=timeout_s,
    )
    if "error" in answer:
        raise QemuUnusable(
            f"{binary} cannot say what the CPU model {model!r} is: {answer['error']['desc']}",
            hint="name an explicit CPU model, as `-cpu Cascadelake-Server-v5`",
        )
    properties: dict[str, Any] = answer["return"]["model"]["props"]
    on = [name for name, value in properties.items() if value is True]
    valued = [f"{name}={value}" for name, value in properties.items() if not isinstance(value, bool)]
    return tuple(sorted(on + valued))


def converse(
    binary: Path,
    options: Sequence[str],
    commands: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    fds: Sequence[int] = (),
    timeout_s: float = ANSWER_S,
) -> list[dict[str, Any]]:
    """Start a binary without a machine, run QMP commands, and end it; return the answer to each command.

    Raises `QemuMissing` when it cannot be executed and `NotQemu` when it does not answer as QEMU does.
    """
    lines: list[dict[str, Any]] = [{"execute": "qmp_capabilities"}]
    lines += [
        {"execute": name, "arguments": dict(arguments), "id": number}
        for number, (name, arguments) in enumerate(commands)
    ]
    command = [
        str(binary), "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S", "-qmp", "stdio", *options,
    ]  # fmt: skip
    with tempfile.TemporaryFile() as stderr:
        try:
            run = subprocess.Popen(
                command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, pass_fds=tuple(fds),
            )  # fmt: skip
        except OSError as error:
            raise QemuMissing(
                f"{binary} cannot be executed: {error.strerror}", hint="is it a binary for this machine?"
            ) from None
        with run:
            try:
                text = "".join(json.dumps(line) + "\n" for line in lines)
                messages = _answers(binary, run, text, len(commands), timeout_s)
            finally:
                run.kill()  # told to quit, it would drop what it has not written yet
        stderr.seek(0)
        said = stderr.read(4096).decode(errors="replace").strip()
    if not messages or "QMP" not in messages[0]:
        raise NotQemu(
            f"{binary} does not speak QMP{': ' + said.splitlines()[0][:200] if said else ''}",
            hint="name QEMU's system emulator, as qemu-system-x86_64",
        )
    answers = {message["id"]: message for message in messages if "id" in message}
    if len(answers) < len(commands):
        raise NotQemu(
            f"{binary} ended in the middle of its answers: {said[:200]}",
            hint="run it by hand with `-machine none` to see why",
        )
    return [answers[number] for number in range(len(commands))]


def _answers(
    binary: Path, run: subprocess.Popen[bytes], text: str, count: int, timeout_s: float
) -> list[dict[str, Any]]:
    """Send commands, and return what comes until the last one is answered or the program ends; nothing if it is no JSON.

    Raises `NotQemu` when it takes too long.
    """
    assert run.stdin is not None
    assert run.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        run.stdin.write(text.encode())
    until = time.monotonic() + timeout_s
    poll = select.poll()
    poll.register(run.stdout, select.POLLIN)
    messages: list[dict[str, Any]] = []
    rest = b""
    while not any(message.get("id") == count - 1 for message in messages):
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            raise NotQemu(
                f"{binary} did not answer QMP within {timeout_s:g} s", hint="is it QEMU's system emulator?"
            )
        data = os.read(run.stdout.fileno(), 1 << 16)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        try:
            messages += [msgspec.json.decode(line, type=dict[str, Any]) for line in lines]
        except msgspec.DecodeError:
            return []
    return messages
