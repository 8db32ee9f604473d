# SPDX-License-Identifier: Apache-2.0
"""The judge of new events: a `transitions` machine made from the table.

The machine carries no callbacks and moves nothing but its own `state`; what an event changes is `fold.evolve`'s business. One model is
reused for all streams, because a machine keeps a reference to each model it has ever seen.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from transitions import Machine, MachineError

from .errors import IllegalTransition
from .events import EFFECT_EVENTS, Event
from .fold import At, Daemon, Session, Streamed
from .guards import GUARDS
from .table import SAME, SESSION, UPDATE, Table


class _Model:
    """What the machine moves: a state and nothing else."""

    state: str


def build(table: Table, model: Any, guards: dict[str, Any] | None = None) -> Machine:
    """Make the `transitions` machine of a table, with `guards` (default: the real ones) as its conditions."""
    judges = GUARDS if guards is None else guards
    return Machine(
        model,
        states=[str(state) for state in table.states],
        initial=str(table.initial),
        auto_transitions=False,
        transitions=[
            {
                "trigger": row.event,
                "source": [str(source) for source in row.sources],
                "dest": "=" if row.dest == SAME else str(row.dest),
                "conditions": [judges[row.guard]] if row.guard else [],
            }
            for row in table.rows
        ],
    )


class Judge:
    """Decides whether an event may happen to a record now. Not thread-safe: one owner."""

    def __init__(self) -> None:
        self._models = {table.name: _Model() for table in (SESSION, UPDATE)}
        self._machines = {table.name: build(table, self._models[table.name]) for table in (SESSION, UPDATE)}

    def check(self, record: Streamed, event: Event, at: At) -> str:
        """Return the state that `event` leads to.

        Raises `IllegalTransition` naming the record, its state and what would have been allowed.
        """
        if isinstance(record, Daemon) or isinstance(event, EFFECT_EVENTS):
            return record.state
        name = "session" if isinstance(record, Session) else "update"
        machine, model = self._machines[name], self._models[name]
        if event.TYPE.split(".", 1)[0] != name or event.NAME not in machine.events:
            raise IllegalTransition(f"{record.id}: {event.TYPE} is not an event of a {name}")
        machine.set_state(str(record.state))
        try:
            moved = machine.events[event.NAME].trigger(model, record, event, at)
        except MachineError:
            allowed = machine.get_triggers(str(record.state))
            raise IllegalTransition(
                f"{record.id} is {record.state}: {event.NAME} cannot happen now",
                hint=f"what can: {', '.join(allowed) or 'nothing, it has ended'}",
            ) from None
        if not moved:
            guard = next(
                row.guard
                for row in _table(name).rows
                if row.event == event.NAME and record.state in row.sources
            )
            why = (GUARDS[guard].__doc__ or guard).strip().rstrip(".").lower()
            raise IllegalTransition(
                f"{record.id} is {record.state}: {event.NAME} cannot happen now", hint=f"it needs: {why}"
            )
        return str(model.state)


def _table(name: str) -> Table:
    return SESSION if name == "session" else UPDATE


def always(answer: bool) -> dict[str, Any]:
    """Return guards that all give one answer; for proofs over every (state, event, guard)."""
    return dict.fromkeys(GUARDS, partial(_constant, answer))


def _constant(answer: bool, *_args: Any) -> bool:
    return answer
