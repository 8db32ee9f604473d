# SPDX-License-Identifier: Apache-2.0
"""The root of every error that luod raises on purpose.

    LuodError                      what failed, on what, and what to do next
      StateError                   states/: an event or command that the state machine refuses
        IllegalTransition
        UnknownEvent, BadEvent
        BadName                  a client id, token or name outside its alphabet
      JournalError                 journal/: exit code 4
        NewerSchema                exit code 5
      EngineError                  engine/
      KernelError                  adapters/: carries errno, operation and subject
      ProtocolError, ConfigError   luod/

Subclasses live beside the code that raises them; this module only holds what all folders share.
"""

from __future__ import annotations


class LuodError(Exception):
    """Something went wrong that a person or a client can act on.

    `message` says what failed and on what; `hint` says what to do next. `exit_code` is what `luoctl` ends with.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class StateError(LuodError):
    """The state machine refuses an event or a command."""


class IllegalTransition(StateError):
    """No row of the table lets this event happen in this state, or its guard said no."""


class UnknownEvent(StateError):
    """An event type that this version does not know; it may come from a newer luod."""

    exit_code = 5


class BadEvent(StateError):
    """A known event type whose body does not decode."""

    exit_code = 4


class BadName(StateError):
    """A client id, session id or token that does not follow the rules of names."""

    exit_code = 2
