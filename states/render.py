# SPDX-License-Identifier: Apache-2.0
"""The pictures of the table: a mermaid diagram and a Markdown table, for the docs.

`python -m luod.states` prints both for both machines.
"""

from __future__ import annotations

from .table import SAME, TABLES, Table


def mermaid(table: Table) -> str:
    """Return the state diagram of a table as mermaid text."""
    lines = ["stateDiagram-v2", f"    [*] --> {table.initial}"]
    for row in table.rows:
        for source in row.sources:
            dest = source if row.dest == SAME else row.dest
            label = f"{row.event} [{row.guard}]" if row.guard else row.event
            lines.append(f"    {source} --> {dest}: {label}")
    lines += [f"    {state} --> [*]" for state in table.final]
    return "\n".join(lines) + "\n"


def markdown(table: Table) -> str:
    """Return a table as a Markdown table, one row a row."""
    lines = ["| event | from | to | guard | meaning |", "| --- | --- | --- | --- | --- |"]
    for row in table.rows:
        dest = "(stays)" if row.dest == SAME else row.dest
        lines.append(
            f"| `{row.event}` | {', '.join(row.sources)} | {dest} | {row.guard or '-'} | {row.meaning} |"
        )
    return "\n".join(lines) + "\n"


def page() -> str:
    """Return the docs page on the state machines."""
    parts = [
        "# State machines\n\nGenerated from `states/table.py` by `python -m luod.states`; a test keeps it equal.\n"
    ]
    for table in TABLES:
        ends = ", ".join(table.final)
        parts.append(f"\n## {table.name.capitalize()}\n\nStarts in `{table.initial}`, ends in {ends}.\n\n")
        parts.append(markdown(table))
        parts.append(f"\n```mermaid\n{mermaid(table)}```\n")
    return "".join(parts)
