# SPDX-License-Identifier: Apache-2.0
"""C structs of the kernel's interface, as tables that can be packed, read, and compared with the headers by a compiler.

Integers are little-endian and nothing is padded implicitly: the structs that the kernel shares with programs name their padding.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

_FORMATS: Final[Mapping[str, str]] = {"u8": "B", "u16": "H", "u32": "I", "s32": "i", "u64": "Q"}


class CStruct:
    """One struct: its C name and its fields in order, each as "TYPE NAME" (u8, u16, u32, s32, u64) or "pad[N] NAME".

    `size` in bytes and `offsets` (field -> byte) follow from the fields. The first field, `size` or `argsz`, says how long the struct
    is; `pack` fills it in.
    """

    def __init__(self, name: str, *fields: str) -> None:
        self.name = name
        self.offsets: dict[str, int] = {}
        self._types: dict[str, struct.Struct] = {}
        self._widths: dict[str, int] = {}
        formats = "<"
        for field in fields:
            kind, _, label = field.partition(" ")
            form = f"{kind[4:-1]}x" if kind.startswith("pad[") else _FORMATS[kind]
            self.offsets[label] = struct.calcsize(formats)
            self._widths[label] = struct.calcsize("<" + form)
            if not kind.startswith("pad["):
                self._types[label] = struct.Struct("<" + form)
            formats += form
        self.struct = struct.Struct(formats)
        self.size = self.struct.size

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields that hold a value, in order."""
        return tuple(self._types)

    def width(self, field: str) -> int:
        """Return how many bytes a field takes."""
        return self._widths[field]

    def pack(self, tail: bytes = b"", /, **values: int) -> bytearray:
        """Build a struct with these values, zero elsewhere, followed by `tail` (a flexible array), its length filled in."""
        buf = bytearray(self.size) + tail
        first = next(iter(self._types))
        if first in ("size", "argsz"):
            self.put(buf, first, len(buf))
        for label, value in values.items():
            self.put(buf, label, value)
        return buf

    def put(self, buf: bytearray, field: str, value: int) -> None:
        """Write one field. `struct.error` for a value that does not fit."""
        self._types[field].pack_into(buf, self.offsets[field], value)

    def get(self, buf: bytes | bytearray, field: str, at: int = 0) -> int:
        """Read one field of a struct that begins at byte `at`."""
        return int(self._types[field].unpack_from(buf, at + self.offsets[field])[0])

    def unpack(self, buf: bytes | bytearray, at: int = 0) -> dict[str, int]:
        """Read every field of a struct that begins at byte `at`."""
        return {field: self.get(buf, field, at) for field in self._types}
