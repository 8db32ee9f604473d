# SPDX-License-Identifier: Apache-2.0
"""One table, many forms: all must be the same machine."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import msgspec
import pytest
from transitions import MachineError

from luod.states import fold, machine, render
from luod.states.events import EFFECT_EVENTS, EVENTS, SESSION_EVENTS, UPDATE_EVENTS
from luod.states.guards import GUARDS
from luod.states.table import SAME, SESSION, TABLES, UPDATE, Row, Table, lookup


class Model:
    state: str


def by_machine(table: Table, answer: bool) -> dict[tuple[str, str], str]:
    """What the generated `transitions` machine does for every (state, event)."""
    model = Model()
    built = machine.build(table, model, machine.always(answer))
    result = {}
    for state, event in itertools.product(table.states, sorted({row.event for row in table.rows})):
        built.set_state(str(state))
        try:
            moved = built.events[event].trigger(model, None, None, None)
            result[str(state), event] = str(model.state) if moved else "guard"
        except MachineError:
            result[str(state), event] = "illegal"
    return result


def by_lookup(table: Table, answer: bool) -> dict[tuple[str, str], str]:
    known = lookup(table)
    result = {}
    for state, event in itertools.product(table.states, sorted({row.event for row in table.rows})):
        dest, guard = known.get((state, event), ("illegal", ""))
        result[str(state), event] = "guard" if guard and not answer and dest != "illegal" else str(dest)
    return result


def by_mermaid(table: Table, answer: bool) -> dict[tuple[str, str], str]:
    result = {
        (str(state), event): "illegal"
        for state, event in itertools.product(table.states, sorted({row.event for row in table.rows}))
    }
    for source, dest, event, guard in re.findall(
        r"^    (\w+) --> (\w+): (\w+)(?: \[(\w+)\])?$", render.mermaid(table), re.MULTILINE
    ):
        result[source, event] = "guard" if guard and not answer else dest
    return result


def by_markdown(table: Table, answer: bool) -> dict[tuple[str, str], str]:
    result = {
        (str(state), event): "illegal"
        for state, event in itertools.product(table.states, sorted({row.event for row in table.rows}))
    }
    for line in render.markdown(table).splitlines()[2:]:
        event, sources, dest, guard, _ = (cell.strip() for cell in line.strip("|").split("|"))
        for source in sources.split(", "):
            to = source if dest == "(stays)" else dest
            result[source, event.strip("`")] = "guard" if guard != "-" and not answer else to
    return result


@pytest.mark.parametrize("answer", [True, False], ids=["guards-yes", "guards-no"])
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_form_is_the_same_machine(table: Table, answer: bool) -> None:
    """For every (state, event, guard) triple the table itself, read row by row, is the judge."""
    want = {}
    for state, event in itertools.product(table.states, sorted({row.event for row in table.rows})):
        rows = [row for row in table.rows if row.event == event and state in row.sources]
        assert len(rows) <= 1, f"two rows for {state}, {event}"
        if not rows:
            want[str(state), event] = "illegal"
        elif rows[0].guard and not answer:
            want[str(state), event] = "guard"
        else:
            want[str(state), event] = str(state if rows[0].dest == SAME else rows[0].dest)
    assert len(want) == len(table.states) * len({row.event for row in table.rows})
    for form in (by_machine, by_lookup, by_mermaid, by_markdown):
        assert form(table, answer) == want, form.__name__


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_state_is_reachable_and_ends_are_ends(table: Table) -> None:
    known = lookup(table)
    seen, todo = {table.initial}, [table.initial]
    while todo:
        state = todo.pop()
        for (source, _), (dest, _) in known.items():
            if source == state and dest not in seen:
                seen.add(dest)
                todo.append(dest)
    assert seen == set(table.states)
    assert {state for state in table.states if not any(source == state for source, _ in known)} == set(
        table.final
    )


def test_a_changed_row_is_noticed() -> None:
    """Break the table and see the comparison fail: the proof can fail."""
    rows = tuple(row._replace(dest="lost") if row.event == "finished" else row for row in SESSION.rows)
    broken = SESSION._replace(rows=rows)
    assert by_machine(broken, True) != by_lookup(SESSION, True)
    no_guard = SESSION._replace(rows=tuple(row._replace(guard="") for row in SESSION.rows))
    assert by_machine(no_guard, False) != by_lookup(SESSION, False)


def test_events_and_rows_name_each_other() -> None:
    assert {cls.NAME for cls in SESSION_EVENTS} == {row.event for row in SESSION.rows}
    assert {cls.NAME for cls in UPDATE_EVENTS} == {row.event for row in UPDATE.rows}
    assert {row.guard for table in TABLES for row in table.rows} - {""} == set(GUARDS)
    assert len(EVENTS) == len({cls.NAME + cls.TYPE for cls in EVENTS.values()})
    assert isinstance(SESSION.rows[0], Row)


def test_the_docs_page_is_the_generated_one() -> None:
    page = Path(__file__).parents[2] / "docs" / "states.md"
    assert page.read_text() == render.page(), "run: python -m luod.states > docs/states.md"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
@pytest.mark.parametrize("answer", [True, False], ids=["guards-yes", "guards-no"])
def test_fold_moves_as_the_table_says(table: Table, answer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`evolve` and `Judge` on real events, in every state, with every guard answering alike."""
    for name in GUARDS:
        monkeypatch.setitem(GUARDS, name, lambda *_: answer)
    judge = machine.Judge()
    classes = SESSION_EVENTS if table is SESSION else UPDATE_EVENTS
    want = by_lookup(table, answer)
    for state, cls in itertools.product(table.states, classes):
        event = example(cls)
        record = (
            fold.Session(id="vm.1", state=state)
            if table is SESSION
            else fold.Update(id="update/1", state=state)
        )
        after = fold.evolve(record, event, fold.At(id=7, boot_id="b"))
        verdict = want[str(state), cls.NAME]
        if verdict in ("illegal", "guard"):
            assert after.state == state
            assert len(after.anomalies) == 1
            with pytest.raises(machine.IllegalTransition):
                judge.check(record, event, fold.At(id=7, boot_id="b"))
        else:
            assert (after.state, after.anomalies) == (verdict, ())
            assert judge.check(record, event, fold.At(id=7, boot_id="b")) == verdict


def example(cls: type[msgspec.Struct]) -> object:
    """Make an event of a type with the plainest values that its fields allow."""
    return msgspec.convert(
        {field.name: plain(field.type) for field in msgspec.structs.fields(cls) if field.required}, cls
    )


def plain(kind: object) -> object:
    info = msgspec.inspect.type_info(kind)
    match info:
        case msgspec.inspect.IntType():
            return 1
        case msgspec.inspect.BoolType():
            return True
        case msgspec.inspect.StrType():
            return "x"
        case msgspec.inspect.LiteralType():
            return info.values[0]
        case msgspec.inspect.VarTupleType():
            return []
        case msgspec.inspect.StructType():
            return {
                field.encode_name: plain(int) if isinstance(field.type, msgspec.inspect.IntType) else "x"
                for field in info.fields
                if field.required
            }
    raise AssertionError(f"no example for {kind}")


def test_effects_never_move_a_state() -> None:
    judge = machine.Judge()
    for state, cls in itertools.product(SESSION.states, EFFECT_EVENTS):
        record = fold.Session(id="vm.1", state=state)
        assert judge.check(record, example(cls), fold.At()) == state
        assert fold.evolve(record, example(cls), fold.At()).state == state
