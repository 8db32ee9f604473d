# SPDX-License-Identifier: Apache-2.0
"""Errors of the engine.

EngineError
  Refused        a command that cannot be obeyed now; `code` is what the wire protocol calls it
  EffectFailed   a call that the world refused; `errno` is the symbolic name
  Unresolved     an effect is in doubt and only a person can say what became of it
"""

from __future__ import annotations

from ..states.errors import LuodError


class EngineError(LuodError):
    """Something the engine cannot do."""


class Refused(EngineError):
    """A command that cannot be obeyed in this state or by this caller."""

    def __init__(self, code: str, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code


class EffectFailed(EngineError):
    """The world refused a call. `errno` is symbolic ("EBUSY"), empty where there is none."""

    def __init__(self, message: str, *, errno: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.errno = errno


class Unresolved(EngineError):
    """An effect is in doubt and its rule is to ask."""
