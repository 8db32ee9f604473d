# SPDX-License-Identifier: Apache-2.0
"""A usual command line becomes one that can go with a kexec, or every reason why it cannot is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luod.adapters.qemu.arguments import (
    Adapted,
    Backend,
    Hardware,
    NotAdaptable,
    Ram,
    adapt,
    backends,
    hardware,
    recorded,
)
from luod.adapters.qemu.commandline import (
    FLAGS,
    Field,
    NotACommandLine,
    Option,
    parse,
    parse_fields,
    parse_size,
    unparse,
    unparse_fields,
)
from luod.adapters.qemu.obstacles import kind_of_place
from luod.adapters.qemu.probe import Capabilities, MachineUnknown, MachineUnversioned

MIB = 1 << 20
QEMU = Capabilities(
    path="/usr/bin/qemu",
    version="11.1.3",
    machines=("pc-q35-11.1", "pc-q35-10.0", "pc-i440fx-11.1", "microvm"),
    aliases={"q35": "pc-q35-11.1", "pc": "pc-i440fx-11.1"},
    default_machine="pc-i440fx-11.1",
    default_cpus={"pc-q35-11.1": "qemu64", "pc-q35-10.0": "qemu64", "pc-i440fx-11.1": "qemu32"},
    cpus=("max", "qemu64"),
    fragile_cpus=("max",),
    ram_by_fdset=False,
)


def on_disk(_path: str) -> str:
    return "ext4"


def adapted(*words: str, recorded: str = "") -> Adapted:
    return adapt(["qemu", *words], QEMU, recorded_machine=recorded, file_system=on_disk)


def reasons(*words: str, place: str = "ext4") -> list[str]:
    with pytest.raises(NotAdaptable) as caught:
        adapt(["qemu", *words], QEMU, file_system=lambda _: place)
    return [str(each) for each in caught.value.obstacles]


# -- the parser

names = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=12).filter(lambda one: one[0] != "-")
keys = st.text("abcdefghijklmnopqrstuvwxyz.-0123456789", min_size=1, max_size=12)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=0, max_size=30)
values = texts.filter(lambda text: not text.startswith("{"))
options = st.one_of(
    st.sampled_from(sorted(FLAGS)).map(Option),
    st.builds(Option, names.filter(lambda name: name not in FLAGS), texts),
    st.builds(Option, st.just(""), values.filter(lambda text: not text.startswith("-"))),
)


@given(st.lists(options, max_size=12))
def test_options_survive_being_written_and_read(given: list[Option]) -> None:
    assert parse(unparse(given)) == given


@given(st.lists(st.builds(Field, keys, st.one_of(st.none(), texts)), max_size=8))
def test_fields_survive_being_written_and_read(given: list[Field]) -> None:
    assert parse_fields(unparse_fields(given)) == given


@given(texts)
def test_any_text_has_fields_or_is_refused(text: str) -> None:
    try:
        fields = parse_fields(text, "first")
    except NotACommandLine:
        assert text.startswith("{")
    else:
        if fields and not text.startswith("{"):
            assert parse_fields(unparse_fields(fields), "first") == fields


@pytest.mark.parametrize(
    ("text", "first", "fields"),
    [
        ("512", "size", [("size", "512")]),
        ("512,slots=2", "size", [("size", "512"), ("slots", "2")]),
        ("unix:/a,,b,server", "chardev", [("chardev", "unix:/a,b"), ("server", None)]),
        ("a=x,,,b=,c=,,", "", [("a", "x,"), ("b", ""), ("c", ",")]),
        (
            '{"driver":"file","cache":{"direct":true},"x":[1]}',
            "",
            [("driver", "file"), ("cache.direct", "on"), ("x.0", "1")],
        ),
    ],
)
def test_fields(text: str, first: str, fields: list[tuple[str, str | None]]) -> None:
    assert parse_fields(text, first) == [Field(*each) for each in fields]


@pytest.mark.parametrize(
    ("text", "unit", "size"),
    [("512", "m", 512 * MIB), ("1G", "m", 1024 * MIB), ("0x1000", "b", 4096), ("1.5g", "b", 1536 * MIB)],
)
def test_sizes(text: str, unit: str, size: int) -> None:
    assert parse_size(text, unit) == size


@pytest.mark.parametrize("text", ["", "x", "0", "-1M", "G", "1e999"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(NotACommandLine):
        parse_size(text)


def test_an_option_without_its_value() -> None:
    with pytest.raises(NotACommandLine, match="-m has no value"):
        adapted("-S", "-m")


# -- what becomes of a command line


def test_a_usual_command_line() -> None:
    found = adapted("-enable-kvm", "-M", "q35,smm=off", "-m", "2G", "-drive", "file=/vm/disk.qcow2,if=virtio")
    assert found.argv({"ram0": 77}, Path("/run/q,mp")) == [
        "qemu", "-machine", "pc-q35-11.1,smm=off,memory-backend=ram0", "-cpu", "qemu64",
        "-object", "memory-backend-file,id=ram0,size=2147483648,mem-path=/proc/self/fd/77,share=on",
        "-enable-kvm", "-m", "2G", "-drive", "file=/vm/disk.qcow2,if=virtio",
        "-chardev", "socket,id=luod-qmp,path=/run/q,,mp,server=on,wait=off", "-mon", "chardev=luod-qmp,mode=control",
    ]  # fmt: skip
    assert found.argv({"ram0": 5}, Path("/q"), incoming=True)[-3:] == ["-incoming", "defer", "-S"]
    assert found.hardware == Hardware("pc-q35-11.1", ("smm=off",), "qemu64", ("kvm",), ("-drive if=virtio",))
    assert not found.paused


def test_no_words_at_all() -> None:
    found = adapted()
    assert found.ram == (Ram("ram0", 128 * MIB),)
    assert (found.hardware.machine, found.hardware.cpu) == ("pc-i440fx-11.1", "qemu32")
    assert len(found.notes) == 3


@pytest.mark.parametrize(
    ("words", "size"),
    [(("-m", "64"), 64 * MIB), (("-m", "64M", "-m", "size=1G"), 1024 * MIB), (("-m", "5000K"), 5000 << 10)],
)
def test_the_size_of_ram(words: tuple[str, ...], size: int) -> None:
    assert adapted(*words).ram == (Ram("ram0", size),)


@pytest.mark.parametrize("kind", ["memfd", "ram", "shm"])
def test_ram_that_the_user_has_named(kind: str) -> None:
    found = adapted(
        "-object", f"memory-backend-{kind},id=mem,size=64M,share=off,prealloc=on,host-nodes=0", "-machine",
        "pc-q35-10.0,memory-backend=mem", "-object", "rng-random,id=ram0", "-m", "64M",
    )  # fmt: skip
    assert found.ram == (Ram("mem", 64 * MIB, ("prealloc=on", "host-nodes=0")),)
    argv = found.argv({"mem": 9}, Path("/q"))
    backend = "memory-backend-file,id=mem,size=67108864,mem-path=/proc/self/fd/9,share=on"
    assert argv.count("-object") == 2
    assert f"{backend},prealloc=on,host-nodes=0" in argv
    assert f"{backend},host-nodes=0" in found.argv({"mem": 9}, Path("/q"), incoming=True)
    assert "pc-q35-10.0,memory-backend=mem" in argv


def test_ram_of_several_nodes() -> None:
    found = adapted(
        "-m", "96M", "-object", '{"qom-type":"memory-backend-memfd","id":"a","size":33554432}',
        "-object", "memory-backend-ram,id=b,size=64M", "-numa", "node,memdev=a", "-numa", "node,memdev=b",
    )  # fmt: skip
    assert found.ram == (Ram("a", 32 * MIB), Ram("b", 64 * MIB))
    assert not any("memory-backend=" in word for word in found.words)
    assert {"@LUOD:a@", "@LUOD:b@"} <= set(found.words)


def test_a_name_for_ram_that_is_free() -> None:
    assert adapted("-object", "iothread,id=ram0").ram[0].id == "ram1"


def test_an_alias_means_the_machine_that_was_saved() -> None:
    assert adapted("-machine", "q35", recorded="pc-q35-10.0").hardware.machine == "pc-q35-10.0"
    assert adapted("-machine", "pc", recorded="pc-q35-10.0").hardware.machine == "pc-i440fx-11.1"
    assert adapted("-machine", "pc-q35-11.1", recorded="pc-q35-10.0").hardware.machine == "pc-q35-11.1"
    with pytest.raises(MachineUnknown, match=r"pc-q35-12\.0"):
        adapted("-machine", "q35", recorded="pc-q35-12.0")


def test_machines_that_cannot_be_pinned() -> None:
    with pytest.raises(MachineUnversioned, match="microvm"):
        adapted("-machine", "microvm")
    with pytest.raises(MachineUnknown):
        adapted("-machine", "pc-q35-9.9")


def test_what_the_guest_cannot_see_is_not_its_shape() -> None:
    one = adapted("-serial", "file:/a", "-display", "none", "-device", "virtio-rng-pci", "-hda", "/x")
    other = adapted("-serial", "stdio", "-vnc", ":1", "-device", "virtio-rng-pci", "-hda", "/y")
    assert one.hardware == other.hardware
    for more in (("-serial", "none"), ("-device", "virtio-rng-pci"), ("-smp", "2"), ("-hdb", "/x")):
        assert (
            adapted("-serial", "stdio", "-device", "virtio-rng-pci", "-hda", "/y", *more).hardware
            != one.hardware
        )


def test_what_is_executed_is_what_was_adapted() -> None:
    found = adapted(
        "-machine", "q35,accel=kvm:tcg", "-cpu", "max,-avx", "-device", "virtio-rng-pci", "-m", "64M"
    )
    argv = found.argv({"ram0": 7}, Path("/q"), incoming=True)
    assert hardware(argv[1:]) == found.hardware
    assert found.hardware.cpu_model == "max"
    assert found.hardware.accelerators == ("kvm", "tcg")
    assert recorded(argv[1:]) == found.words
    assert recorded(found.argv({"ram0": 9}, Path("/a,b"))[1:]) == found.words
    assert backends(argv[1:]) == [Backend("ram0", "memory-backend-file", 64 * MIB, True, "/proc/self/fd/7")]


def test_a_guest_that_is_started_stopped() -> None:
    assert adapted("-S").paused
    assert "-S: a new guest waits for `cont` on a monitor of yours" in adapted("-S").notes


# -- what cannot be carried over


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("-snapshot",), "temporary file"),
        (("-drive", "file=/x,snapshot=on"), "temporary file"),
        (("-daemonize",), "systemd"),
        (("-incoming", "defer"), "comes in"),
        (("-mem-path", "/dev/hugepages"), "only memfds"),
        (("-m", "1G,slots=2,maxmem=4G"), "plugged in later"),
        (("-m", "1G", "-m", "maxmem=4G"), "plugged in later"),
        (("-device", "vfio-pci,host=01:00.0"), "the host's own"),
        (("-device", '{"driver":"vfio-pci","host":"01:00.0"}'), "the host's own"),
        (("-device", "vhost-user-fs-pci,chardev=c,tag=t"), "process of the host"),
        (("-netdev", "vhost-user,id=n,chardev=c"), "outside QEMU"),
        (("-readconfig", "/etc/vm.conf"), "not seen here"),
        (("-loadvm", "one"), "snapshot"),
        (("-netdev", "tap,id=n,fd=3"), "handed to this process"),
        (("-chardev", "socket,id=c,fd=3"), "handed to this process"),
        (("-blockdev", "driver=file,node-name=a,filename=/dev/fdset/1"), "handed to this process"),
        (("-add-fd", "fd=3,set=1"), "handed to this process"),
        (("-device", "nvdimm,memdev=m"), "a device of its own"),
        (("-device", "virtio-mem-pci,memdev=m"), "a device of its own"),
        (("-device", "ivshmem-plain,memdev=m"), "shared with others"),
        (("-device", "usb-host"), "host's kernel"),
        (("-object", "sev-guest,id=s"), "encrypted"),
        (("-machine", "q35,confidential-guest-support=s"), "encrypted"),
        (("-object", "memory-backend-ram,id=m,size=1M"), "not the RAM of the machine"),
        (
            ("-object", "memory-backend-memfd,id=m,size=4M,hugetlb=on", "-machine", "q35,memory-backend=m"),
            "huge pages",
        ),
        (
            ("-object", "memory-backend-file,id=m,size=4M,mem-path=/x", "-machine", "q35,memory-backend=m"),
            "only memfds",
        ),
        (
            ("-object", "memory-backend-ram,id=m,size=4M,discard-data=on", "-machine", "q35,memory-backend=m"),
            "discard-data",
        ),
        (("-object", "memory-backend-ram,id=m,size=4097", "-machine", "q35,memory-backend=m"), "multiple"),
        (("-machine", "q35,memory-backend=m"), "no such object"),
        (("-numa", "node,mem=1G"), "memdev="),
        (("-name", "@LUOD:ram0@"), "of luo-qemu's own"),
        (("--help",), "only print"),
    ],
)  # fmt: skip
def test_what_stands_in_the_way(words: tuple[str, ...], reason: str) -> None:
    (found,) = reasons(*words)
    assert reason in found
    assert found.count(": ") >= 1
    assert "; " in found


@pytest.mark.parametrize(
    "words",
    [
        ("/x.img",),
        ("-hda", "/x.img"),
        ("-drive", "file=/x.img,format=raw"),
        ("-drive", "/x.img"),
        ("-blockdev", "driver=file,node-name=a,filename=/x.img"),
        ("-blockdev", '{"driver":"qcow2","file":{"driver":"file","filename":"/x.img"}}'),
        ("-drive", "file=file:/x.img"),
    ],
)
def test_disks_must_lie_on_a_disk(words: tuple[str, ...]) -> None:
    adapted(*words)
    for volatile in ("tmpfs", "ramfs"):
        (found,) = reasons(*words, place=volatile)
        assert f"/x.img lies in memory ({volatile})" in found


def test_a_disk_over_the_network_lies_nowhere() -> None:
    adapt(["qemu", "-drive", "file=nbd://host/x"], QEMU, file_system=lambda _: "tmpfs")


def test_every_reason_is_given_at_once() -> None:
    assert len(reasons("-snapshot", "-daemonize", "-m", "1G,slots=1", "-device", "vfio-pci")) == 4


def test_where_a_path_lies() -> None:
    assert kind_of_place("/proc/self/status") == "proc"
    assert kind_of_place("/nowhere/at/all") == ""
    assert kind_of_place("/dev/shm") in ("tmpfs", "")
