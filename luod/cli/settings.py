# SPDX-License-Identifier: Apache-2.0
"""check-config: what luod would make of a file of settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .printing import json_option, print_json

TABLES = frozenset({"deadlines", "limits"})


@click.command("check-config")
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def check_config(file: Path, as_json: bool) -> None:
    """Check a file of settings for luod, and show all that it sets or leaves as it is."""
    import msgspec

    from ..daemon.config import ConfigError, load

    try:
        config: dict[str, Any] = msgspec.to_builtins(load(file, {}))
    except ConfigError as error:
        error.hint = error.hint or "correct the file; docs/operating.md lists the settings"
        raise
    if as_json:
        print_json({"ok": True, "path": str(file), "config": config})
        return
    click.echo(f"{file}: the settings are good")
    for name, value in config.items():
        parts: dict[str, Any] = (
            {f"{name}.{key}": each for key, each in value.items()} if name in TABLES else {name: value}
        )
        for key, each in parts.items():
            click.echo(f"  {key} = {json.dumps(each)}")
