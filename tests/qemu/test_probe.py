# SPDX-License-Identifier: Apache-2.0
"""What a binary can do is asked of the binary; one that is no QEMU, or too old, says so clearly."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from luod.adapters.qemu import probe as probing
from luod.adapters.qemu.probe import Capabilities, probe

FAKE = """#!{python} -u
import json, os, sys
with open({log!r}, "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
answers = json.loads({answers!r})
print(json.dumps({{"QMP": {{}}}}))
for line in sys.stdin:
    command = json.loads(line)
    if "id" in command:
        answer = answers[command["id"]]
        if answer is None:
            sys.exit("qemu: out of order")
        print(json.dumps({{"id": command["id"], **answer}}))
        print(json.dumps({{"event": "RTC_CHANGE"}}))
"""

MACHINES = [
    {"name": "pc-q35-10.0", "alias": "q35", "default-cpu-type": "qemu64-x86_64-cpu"},
    {"name": "pc-i440fx-10.0", "alias": "pc", "is-default": True, "default-cpu-type": "qemu64-x86_64-cpu"},
    {"name": "microvm"},
]


def answers(*, mode: str = "cpr-reboot", capability: str = "x-ignore-shared") -> list[Any]:
    schema = [
        {"meta-type": "enum", "values": ["normal", mode]},
        {"meta-type": "enum", "values": [capability]},
        {"meta-type": "command", "name": "cpr-reboot x-ignore-shared"},
    ]
    cpus = [{"name": "max", "migration-safe": False}, {"name": "qemu64", "migration-safe": True}]
    return [
        {"return": {"qemu": {"major": 10, "minor": 0, "micro": 2}}},
        {"return": MACHINES},
        {"return": cpus},
        {"return": schema},
        {"error": {"class": "GenericError", "desc": "no"}},
        {"return": {}},
    ]


class Fake:
    """A program that answers as it is told, each answer at once as QEMU does, and notes how often it was started."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "qemu-system-fake"
        self.log = directory / "runs"

    def write(self, said: list[Any]) -> str:
        self.path.write_text(FAKE.format(python=sys.executable, log=str(self.log), answers=json.dumps(said)))
        self.path.chmod(0o755)
        return str(self.path)

    def runs(self) -> int:
        return len(self.log.read_text().splitlines())


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def test_what_it_says_is_believed(fake: Fake) -> None:
    found = probe(fake.write(answers()))
    assert found == Capabilities(
        path=str(fake.path),
        version="10.0.2",
        machines=("microvm", "pc-i440fx-10.0", "pc-q35-10.0"),
        aliases={"q35": "pc-q35-10.0", "pc": "pc-i440fx-10.0"},
        default_machine="pc-i440fx-10.0",
        default_cpus={"pc-q35-10.0": "qemu64", "pc-i440fx-10.0": "qemu64"},
        cpus=("max", "qemu64"),
        fragile_cpus=("max",),
        ram_by_fdset=False,
    )


def test_machine_types_are_pinned(fake: Fake) -> None:
    found = probe(fake.write(answers()))
    assert found.pin("q35") == found.pin("pc-q35-10.0") == "pc-q35-10.0"
    assert found.pin("") == "pc-i440fx-10.0"
    with pytest.raises(probing.MachineUnversioned, match="microvm"):
        found.pin("microvm")
    with pytest.raises(probing.MachineUnknown, match=r"pc-q35-11\.1"):
        found.pin("pc-q35-11.1")


@pytest.mark.parametrize(
    ("name", "has"),
    [("pc-q35-10.0", True), ("virt-9.2", True), ("q35", False), ("microvm", False), ("pc-q35-10", False)],
)
def test_versioned(name: str, has: bool) -> None:
    assert probing.versioned(name) is has


@pytest.mark.parametrize(
    ("said", "missing"),
    [
        (answers(mode="cpr-transfer"), "cpr-reboot"),
        (answers(capability="multifd"), "x-ignore-shared"),
    ],
)
def test_a_qemu_that_is_too_old(said: list[Any], missing: str, fake: Fake) -> None:
    with pytest.raises(probing.QemuTooOld, match=missing) as caught:
        probe(fake.write(said))
    assert "10.0.2" in str(caught.value)


def test_a_qemu_that_cannot_open_the_memory(fake: Fake) -> None:
    said = answers()
    said[5] = {"error": {"class": "GenericError", "desc": "Permission denied"}}
    with pytest.raises(probing.QemuUnusable, match="Permission denied"):
        probe(fake.write(said))


def test_a_qemu_that_ends_too_soon(fake: Fake) -> None:
    with pytest.raises(probing.NotQemu, match="out of order"):
        probe(fake.write([*answers()[:3], None]))


@pytest.mark.parametrize("text", ["#!/bin/sh\ncat\n", "#!/bin/sh\necho hello\n", "#!/bin/sh\nexit 3\n"])
def test_a_program_that_is_no_qemu(text: str, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text(text)
    program.chmod(0o755)
    with pytest.raises(probing.NotQemu):
        probe(str(program))


def test_answers_longer_than_a_pipe_are_read_whole(fake: Fake) -> None:
    said = answers()
    said[3]["return"] += [{"meta-type": "object", "name": "x" * 1000}] * 2000
    assert probe(fake.write(said)).version == "10.0.2"


def test_a_program_that_does_not_answer(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    program.chmod(0o755)
    with pytest.raises(probing.NotQemu, match=r"within 0\.2 s"):
        probe(str(program), timeout_s=0.2)


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(probing.QemuMissing, match="no such program"):
        probe("qemu-system-that-is-not-there")
    file = tmp_path / "file"
    file.write_text("text")
    with pytest.raises(probing.QemuMissing, match="may not be executed"):
        probe(str(file))
    file.chmod(0o755)
    file.write_bytes(b"\x7fELF")
    with pytest.raises(probing.QemuMissing, match="cannot be executed"):
        probe(str(file))


def test_an_answer_is_kept_for_as_long_as_the_binary_is_the_same(fake: Fake, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    binary = fake.write(answers())
    first = probe(binary, cache=cache)
    assert probe(binary, cache=cache) == first
    assert fake.runs() == 1
    newer = answers()
    newer[0]["return"]["qemu"]["major"] = 11
    fake.write(newer)
    assert probe(binary, cache=cache).version == "11.0.2"
    for kept in cache.iterdir():
        kept.write_text("{}")
    assert probe(binary, cache=cache).version == "11.0.2"


@pytest.mark.lab
def test_the_real_one(tmp_path: Path) -> None:
    found = probe("qemu-system-x86_64", cache=tmp_path)
    assert found == probe(shutil.which("qemu-system-x86_64") or "", cache=tmp_path)
    assert found.pin("q35").startswith("pc-q35-")
    assert probing.versioned(found.pin(""))
    assert {"host", "max"} <= set(found.fragile_cpus)
    assert "qemu64" in found.cpus
    assert set(found.default_cpus.values()) <= set(found.cpus) | {"486", "athlon"}


@pytest.mark.lab
def test_what_a_cpu_model_means_here() -> None:
    binary = probing.locate("qemu-system-x86_64")
    most = probing.features(binary, ["tcg"], "max")
    assert "sse2" in most
    assert set(most) != set(probing.features(binary, ["tcg"], "qemu64"))
    with pytest.raises(probing.QemuUnusable, match="no-such-model"):
        probing.features(binary, ["tcg"], "no-such-model")
