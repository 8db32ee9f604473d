# SPDX-License-Identifier: Apache-2.0
"""A journal as text: a manifest, one record a line, a trailer. It proves itself.

    {"luod_journal":1,"journal":...,"genesis":...,"sqlite":...,"luod":...}
    {"id":1,"stream":"luod","seq":1,"type":"daemon.started.v1",...,"body":{...},"chain":"..."}
    {"rows":1,"head":1,"chain":"..."}

The body stands there byte for byte as in the journal, so the chain can be checked from the text alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from .audit import Audit, Gap, Report
from .damage import Damage
from .errors import JournalMissing, NewerSchema, NotAJournal
from .record import CHAIN_SIZE, COLUMNS, Record, to_json

FORMAT = 1
_MARK = b'{"luod_journal":'
_encoder = msgspec.json.Encoder()


class Manifest(msgspec.Struct, frozen=True):
    """The first line. `genesis` is the chain value before row 1, in hex; `luod` and `sqlite` say what wrote the file."""

    luod_journal: int
    journal: str
    genesis: str
    luod: str = ""
    sqlite: str = ""


class Trailer(msgspec.Struct, frozen=True):
    """The last line: how many records there are, the id of the last and its chain value in hex."""

    rows: int
    head: int
    chain: str


class _Line(msgspec.Struct):
    id: int
    stream: str
    seq: int
    type: str
    wall_ns: int
    boot_ns: int
    boot_id: str
    run_id: str
    cause: int | None
    body: msgspec.Raw
    chain: str


def write(records: Iterable[Record], to: IO[bytes], manifest: Manifest) -> Trailer:
    """Write records as text and return the trailer. `manifest` needs the journal id and its genesis."""
    rows, head, chain = 0, 0, manifest.genesis
    to.write(_encoder.encode(manifest) + b"\n")
    for record in records:
        to.write(_encoder.encode(to_json(record)) + b"\n")
        rows, head, chain = rows + 1, record.id, record.chain.hex()
    trailer = Trailer(rows, head, chain)
    to.write(_encoder.encode(trailer) + b"\n")
    return trailer


def looks_like(path: Path) -> bool:
    """Tell whether the file begins like an exported journal."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MARK)) == _MARK
    except OSError:
        return False


class Import:
    """The records of an exported file, checked as they pass. Iterate once, then ask for `report()`."""

    def __init__(self, path: Path | str) -> None:
        """Open the file; raises `JournalMissing`, `NotAJournal` and `NewerSchema`."""
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                first = file.readline()
        except OSError as error:
            raise JournalMissing(
                f"cannot read {self.path}: {error.strerror}", hint="name an exported journal"
            ) from None
        try:
            self.manifest = msgspec.json.decode(first, type=Manifest)
            start = bytes.fromhex(self.manifest.genesis)
        except (msgspec.MsgspecError, ValueError, UnicodeDecodeError):
            raise NotAJournal(
                f"{self.path} is not an exported journal", hint="it must begin with its manifest"
            ) from None
        if self.manifest.luod_journal > FORMAT:
            raise NewerSchema(
                f"{self.path} has format {self.manifest.luod_journal}; this luod knows {FORMAT}",
                hint="read it with the luod that wrote it",
            )
        good = len(start) == CHAIN_SIZE
        self.audit = Audit(str(self.path), self.manifest.journal, start if good else None)
        if not good:
            self.audit.damage.append(
                Damage("line", "the manifest does not hold a chain value", file=self.path.name)
            )
        self._trailer: Trailer | None = None
        self._wrong: list[Damage] = []

    def __iter__(self) -> Iterator[Record]:
        yield from self.audit.run(self._rows())
        self.audit.damage.extend(self._wrong)
        name = self.path.name
        if self._trailer is None:
            self.audit.damage.append(
                Damage("line", "the file ends without its trailer: it was cut", file=name)
            )
        elif not self._wrong and not self.audit.damage:
            found = Trailer(self.audit.rows, self.audit.head, self.audit.chain.hex())
            if found != self._trailer:
                what = f"the trailer says {self._trailer.rows} rows up to {self._trailer.head}, {found.rows} are there"
                self.audit.damage.append(Damage("line", what, file=name))

    def report(self) -> Report:
        """Tell what was found up to where the iteration has come."""
        return self.audit.report()

    def _rows(self) -> Iterator[Any]:
        at = 0
        expected = 1
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                place, at = at, at + len(line)
                if number == 1:
                    continue
                if self._trailer is not None:
                    self._bad(number, place, "stands behind the trailer")
                    continue
                try:
                    row = _parse(line)
                except (msgspec.MsgspecError, ValueError, UnicodeDecodeError) as error:
                    try:
                        self._trailer = msgspec.json.decode(line, type=Trailer)
                    except (msgspec.MsgspecError, UnicodeDecodeError):
                        self._bad(number, place, f"is no record: {error}")
                        yield Gap(expected, expected, f"line {number} is no record")
                        expected += 1
                    continue
                expected = row[0] + 1
                yield row

    def _bad(self, number: int, place: int, what: str) -> None:
        self._wrong.append(Damage("line", f"line {number} {what}", file=self.path.name, offset=place))


def _parse(line: bytes) -> tuple[Any, ...]:
    parsed = msgspec.json.decode(line, type=_Line)
    values = [getattr(parsed, name) for name in COLUMNS]
    values[-2:] = bytes(parsed.body), bytes.fromhex(parsed.chain)
    return tuple(values)


def verify_file(path: Path) -> Report:
    """Check an exported file from its first to its last line."""
    source = Import(path)
    for _ in source:
        pass
    return source.report()
