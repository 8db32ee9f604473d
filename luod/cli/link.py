# SPDX-License-Identifier: Apache-2.0
"""The way to luod: one connection a verb."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from ..client import Client

ANSWER_S = 30.0


@contextmanager
def luod(timeout: float = ANSWER_S) -> Iterator[Client]:
    """Connect to the luod that the command line names. Raises `Unreachable`; an answer may take `timeout` seconds."""
    ctx = click.get_current_context()
    with Client.connect(str(ctx.find_root().obj), timeout=timeout) as link:
        link.hello(["progress"])
        yield link
