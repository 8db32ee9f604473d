# SPDX-License-Identifier: Apache-2.0
"""luod's settings: a TOML file, overridden by the command line.

Every setting has a default that is right for a host with `/dev/liveupdate`; an unknown key or a value out of range is an error that
names it, because a misspelt deadline is a lost guest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from ..states.errors import LuodError

Seconds = Annotated[float, msgspec.Meta(ge=0, le=86400)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
DEFAULT_CONFIG = Path("/etc/luod/luod.toml")


class ConfigError(LuodError):
    """A configuration that cannot be used."""

    exit_code = 2


class Deadlines(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long things may take, in seconds. 0 means no limit where a limit may be absent."""

    update_s: Seconds = 120.0
    """From KEXEC to the kexec itself."""
    freeze_s: Seconds = 10.0
    """From FREEZE to the last READY: the part of the blackout that clients cause."""
    abort_s: Seconds = 10.0
    """From ABORT to the last ABORTED; afterwards who still holds is named, and the abort is recorded."""
    claim_s: Seconds = 0.0
    """From the new kernel to CLAIM; 0 keeps unclaimed sessions for ever."""
    device_s: Seconds = 5.0
    """How long a busy `/dev/liveupdate` is retried."""
    poll_s: Annotated[float, msgspec.Meta(ge=0.05, le=60)] = 1.0
    """How often a claimed session is asked whether its client has run FINISH."""


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one uid may use; the uid of luod and root are not limited."""

    sessions: Count = 1000
    connections: Count = 1000
    outbox_bytes: Count = 1_048_576
    """Unsent bytes after which a client that does not read is cut off."""


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many sessions are stopped and brought back at the same time, beside the order that their clients asked for. 0 is no limit."""

    freeze_at_once: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0
    restore_at_once: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0
    wait_s: Seconds = 10.0
    """How long, from the new kernel's start, a CLAIM waits for those that should come before it; and how long for a free place."""


class Updating(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What luod does in an update beside what it asks of its clients."""

    sync_s: Seconds = 10.0
    """How long FREEZE waits for the file systems to be written back; 0 leaves them as they are."""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All settings."""

    kernel: Literal["device", "emulated"] = "device"
    emulator: str = ""
    device: Literal["per-call", "held"] = "per-call"
    state_dir: str = "/var/lib/luod"
    run_dir: str = "/run/luod"
    volatile: bool = False
    admins: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = ()
    """Uids, beside root and luod's own, that may load, kexec, abort, resolve and see everything."""
    black_box_bytes: Annotated[int, msgspec.Meta(ge=65536, le=64 << 20)] = 1 << 20
    deadlines: Deadlines = Deadlines()
    limits: Limits = Limits()
    order: Order = Order()
    update: Updating = Updating()

    @property
    def journal_path(self) -> Path:
        """Where the journal is."""
        return Path(self.state_dir) / "journal.db"

    @property
    def socket_path(self) -> Path:
        """Where clients connect."""
        return Path(self.run_dir) / "liveupdate.sock"


def load(path: Path | None, overrides: dict[str, Any]) -> Config:
    """Read the settings of `path` (None: the default file if it exists) with `overrides` on top.

    Raises `ConfigError` naming the file and the key.
    """
    import tomllib

    explicit = path is not None
    path = path or DEFAULT_CONFIG
    values: dict[str, Any] = {}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if explicit:
            raise ConfigError(f"configuration {path} does not exist", hint="check --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"configuration {path} is not TOML: {error}") from None
    values.update({key: value for key, value in overrides.items() if value is not None})
    try:
        config = msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"configuration {path if values else ''}: {error}", hint="docs/operating.md lists the settings"
        ) from None
    if config.kernel == "emulated" and not config.emulator:
        raise ConfigError('kernel = "emulated" needs the emulator\'s directory', hint="give --emulator DIR")
    return config
