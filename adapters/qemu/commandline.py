# SPDX-License-Identifier: Apache-2.0
"""QEMU's command line as data: which words are options, which belong to them, and what `key=value,...` means.

Read off qemu-options.hx, util/qemu-option.c and util/keyval.c of QEMU 10.0. Nothing is judged here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import msgspec

from ...states.errors import LuodError

FLAGS = frozenset(
    (
        "h", "help", "version", "snapshot", "usb", "no-fd-bootchk", "nographic", "full-screen", "win2k-hack", "enable-kvm",
        "enable-fips", "no-reboot", "no-shutdown", "daemonize", "only-migratable", "nodefaults", "no-user-config", "preconfig", "S", "s",
        "xen-attach", "xen-domid-restrict", "mem-prealloc", "perfmap", "jitdump", "enable-sync-profile", "semihosting",
        "async-teardown", "singlestep", "no-acpi", "no-hpet", "no-kvm", "nouserconfig",
    )
)  # fmt: skip
"""Options that take no value; every other takes the word behind it."""

_UNITS = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}


class NotACommandLine(LuodError):
    """The words are not what QEMU could take for its command line."""

    exit_code = 2


class Option(NamedTuple):
    """One option without its dash, and its value; a disk image that stands alone has an empty name."""

    name: str
    value: str | None = None

    def words(self) -> list[str]:
        """Return the option as words of a command line."""
        if not self.name:
            return [self.value or ""]
        return [f"-{self.name}"] + ([] if self.value is None else [self.value])

    def __str__(self) -> str:
        return " ".join(self.words())


class Field(NamedTuple):
    """One `key=value` of an option's value; a bare word has no value, and means on."""

    key: str
    value: str | None = None

    @property
    def on(self) -> bool:
        """Whether the value switches something on."""
        return self.value is None or self.value in ("on", "yes", "true", "y")

    def __str__(self) -> str:
        return self.key if self.value is None else f"{self.key}={self.value.replace(',', ',,')}"


def parse(words: Sequence[str]) -> list[Option]:
    """Split the words behind QEMU's name into options. Raises `NotACommandLine` for an option whose value is missing."""
    options: list[Option] = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("-") or word == "-":
            options.append(Option("", word))
            continue
        name = word[2:] if word.startswith("--") else word[1:]
        if name in FLAGS:
            options.append(Option(name))
            continue
        value = next(rest, None)
        if value is None:
            raise NotACommandLine(
                f"option {word} has no value", hint="QEMU's options are in qemu-system-x86_64(1)"
            )
        options.append(Option(name, value))
    return options


def unparse(options: Iterable[Option]) -> list[str]:
    """Return options as words again."""
    return [word for option in options for word in option.words()]


def parse_fields(text: str, first: str = "") -> list[Field]:
    """Split `key=value,...`; a comma in a value is written twice. `first` is the key that the first value has when it has none.

    JSON is read too, where QEMU takes it: keys of inner objects are joined by dots. Raises `NotACommandLine` for broken JSON.
    """
    if text.startswith("{"):
        try:
            return list(_flattened("", msgspec.json.decode(text, type=dict[str, Any])))
        except msgspec.DecodeError as error:
            raise NotACommandLine(f"{text[:60]!r} is not JSON: {error}") from None
    fields: list[Field] = []
    for part in _parts(text):
        key, equals, value = part.partition("=")
        if equals and "," not in key:
            fields.append(Field(key, value))
        elif not fields and first:
            fields.append(Field(first, part))
        else:
            fields.append(Field(part))
    return fields


def unparse_fields(fields: Iterable[Field]) -> str:
    """Return fields as the value of an option."""
    return ",".join(str(field) for field in fields)


def _parts(text: str) -> list[str]:
    """Split at single commas; two are one that belongs to the value."""
    parts, part, at = list[str](), "", 0
    while at < len(text):
        if text.startswith(",,", at):
            part += ","
            at += 2
        elif text[at] == ",":
            parts.append(part)
            part = ""
            at += 1
        else:
            part += text[at]
            at += 1
    if part or parts:
        parts.append(part)
    return [each for each in parts if each]


def _flattened(prefix: str, value: Any) -> Iterable[Field]:
    if isinstance(value, Mapping):
        for key, inner in cast("Mapping[str, Any]", value).items():
            yield from _flattened(f"{prefix}.{key}" if prefix else key, inner)
    elif isinstance(value, list):
        for number, inner in enumerate(cast("list[object]", value)):
            yield from _flattened(f"{prefix}.{number}", inner)
    elif isinstance(value, bool):
        yield Field(prefix, "on" if value else "off")
    else:
        yield Field(prefix, str(value))


def lookup(fields: Iterable[Field], key: str) -> str | None:
    """Return the value of the last field of a key, as QEMU does; `on` for a bare word, None where there is none."""
    found = None
    for field in fields:
        if field.key == key:
            found = "on" if field.value is None else field.value
    return found


def parse_size(text: str, unit: str = "b") -> int:
    """Return a size in bytes: a number with an optional suffix of B, K, M, G, T, P or E; `unit` is what a bare number counts.

    Raises `NotACommandLine`.
    """
    number, suffix = text, unit
    if text[-1:].lower() in _UNITS and not text.lower().startswith("0x"):
        number, suffix = text[:-1], text[-1].lower()
    try:
        count = int(number, 16) if number.lower().startswith("0x") else float(number)
        size = int(count * (1 << _UNITS[suffix]))
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise NotACommandLine(f"{text!r} is no size", hint="as 512M or 4G")
    return size
