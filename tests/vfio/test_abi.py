# SPDX-License-Identifier: Apache-2.0
"""The tables of iommufd and VFIO against the kernel's own headers: a C compiler is asked about every number, size and offset."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest

from luod.adapters.cstruct import CStruct
from luod.adapters.iommufd import abi as iommufd
from luod.adapters.vfio import abi as vfio
from luod.lab import headers
from luod.lab.errors import LabUnavailable

TABLES = {"linux/iommufd.h": iommufd, "linux/vfio.h": vfio}


def statements(table: ModuleType) -> Iterable[str]:
    """Write what the tables say as C: each line stops the compiler when it is wrong."""
    for name, value in {**table.REQUESTS, **table.CONSTANTS}.items():
        yield f'_Static_assert({name} == {value:#x}, "{name}");'
    for layout in table.STRUCTS:
        yield from of_struct(layout)


def of_struct(layout: CStruct) -> Iterable[str]:
    c_name = f"struct {layout.name}"
    yield f'_Static_assert(sizeof({c_name}) == {layout.size}, "{layout.name}");'
    for field, offset in layout.offsets.items():
        yield f'_Static_assert(offsetof({c_name}, {field}) == {offset}, "{layout.name}.{field}");'
        width = layout.width(field)
        yield f'_Static_assert(sizeof((({c_name} *)0)->{field}) == {width}, "width of {layout.name}.{field}");'


def compile_program(include: list[str], lines: Iterable[str], place: Path) -> str:
    """Compile; return what the compiler has to complain about, empty when every statement holds."""
    source = place / "layout.c"
    names = "".join(f"#include <{name}>\n" for name in TABLES)
    source.write_text("#include <stddef.h>\n" + names + "\n".join(lines) + "\n", "ascii")
    done = subprocess.run(
        ["gcc", "-std=c11", "-fsyntax-only", "-Werror", *include, source],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stderr


@pytest.fixture(scope="module")
def include() -> list[str]:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not here: install gcc and libc6-dev")
    try:
        return headers.include_options(headers.fetch((7, 3)))
    except LabUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.lab
def test_numbers_sizes_and_offsets_are_the_kernels(include, tmp_path) -> None:
    lines = [line for table in TABLES.values() for line in statements(table)]
    assert len(lines) > 250
    assert compile_program(include, lines, tmp_path) == ""


@pytest.mark.lab
@pytest.mark.parametrize(
    "wrong",
    [
        CStruct("iommu_destroy", "u32 size", "pad[4] gap", "u32 id"),
        CStruct("vfio_irq_info", "u32 argsz", "u32 flags", "u32 count", "u32 index"),
        CStruct("vfio_group_status", "u32 argsz", "u16 flags", "u16 argsz2"),
    ],
    ids=lambda layout: layout.name,
)
def test_a_wrong_layout_is_found(include, tmp_path, wrong) -> None:
    assert f'"{wrong.name}' in compile_program(include, of_struct(wrong), tmp_path)


@pytest.mark.lab
def test_a_wrong_number_is_found(include, tmp_path) -> None:
    wrong = ModuleType("wrong")
    vars(wrong).update(REQUESTS={"IOMMU_IOAS_MAP_FILE": 0x3B8E}, CONSTANTS={}, STRUCTS=())
    assert "IOMMU_IOAS_MAP_FILE" in compile_program(include, statements(wrong), tmp_path)


def test_every_request_of_a_table_can_be_told_apart() -> None:
    for table in TABLES.values():
        assert len(set(table.REQUESTS.values())) == len(table.REQUESTS)


def test_a_struct_says_how_long_it_is() -> None:
    buf = vfio.S_IRQ_SET.pack(b"\1\2\3\4", count=1)
    assert len(buf) == 24
    assert vfio.S_IRQ_SET.unpack(buf) == {"argsz": 24, "flags": 0, "index": 0, "start": 0, "count": 1}
    assert iommufd.S_IOAS_MAP_FILE.get(iommufd.S_IOAS_MAP_FILE.pack(fd=-1), "fd") == -1
