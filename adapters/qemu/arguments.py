# SPDX-License-Identifier: Apache-2.0
"""A user's usual QEMU command line, made into one whose guest can live through a kexec.

    -m 4G -machine q35                 RAM of QEMU's own, that ends with it
      |
      v
    -m 4G -machine pc-q35-10.0,memory-backend=ram0 -cpu qemu64
    -object memory-backend-file,id=ram0,size=4294967296,mem-path=/proc/self/fd/N,share=on
    -chardev socket,id=luod-qmp,... -mon chardev=luod-qmp,mode=control

RAM goes into memfds that outlive the kernel, the machine type and the CPU model are written out so that another QEMU builds the same
machine, and a monitor of our own stands beside the user's. Where a command line cannot be carried over, every reason is given at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from ...states.errors import LuodError
from .commandline import Field, Option, lookup, parse, parse_fields, parse_size, unparse_fields
from .obstacles import FIRST_KEYS, FileSystem, Obstacle, obstacles
from .probe import Capabilities

MARK = "@LUOD:"
"""What stands in a recorded command line for RAM: `@LUOD:ram0@`."""
MONITOR_ID = "luod-qmp"
DEFAULT_RAM = 128 << 20
"""RAM of a machine without -m, in bytes (hw/core/machine.c)."""
_RAM_STEP = 8192
_PAGE = 4096
_LONGEST_ID = 64
_OURS = frozenset({"qom-type", "id", "size", "mem-path", "share", "hugetlb", "hugetlbsize", "seal"})
_PREALLOCATION = frozenset({"prealloc", "prealloc-threads", "prealloc-context"})

_SEEN = frozenset(
    (
        "device", "smp", "numa", "global", "set", "nic", "net", "usb", "usbdevice", "vga", "rtc", "smbios", "acpitable", "fw_cfg",
        "drive", "hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "mtdblock", "sd", "pflash", "serial", "parallel", "debugcon",
        "virtfs", "audio", "soundhw", "watchdog", "nodefaults", "nographic", "icount", "no-acpi", "no-hpet", "option-rom", "tpmdev",
    )
)  # fmt: skip
"""Options that a guest can see: both QEMUs must have the same ones, in the same order."""


class NotAdaptable(LuodError):
    """A command line whose guest cannot be carried over; `obstacles` has every reason."""

    exit_code = 2

    def __init__(self, found: Sequence[Obstacle]) -> None:
        lines = "".join(f"\n  {each}" for each in found)
        super().__init__(f"this guest cannot be carried over a kexec:{lines}")
        self.obstacles = tuple(found)


class Ram(msgspec.Struct, frozen=True):
    """One piece of the guest's RAM: the id of its backend, its size in bytes, and what the user wants of the backend besides."""

    id: str
    size: int
    extra: tuple[str, ...] = ()

    def backend(self, fd: int, *, incoming: bool) -> str:
        """Return the backend that puts this piece into the memfd `fd` of QEMU.

        Memory of a guest that comes in is there already: allocating it once more costs 50 ms a GiB and brings nothing.
        """
        extra = [
            field
            for text in self.extra
            for field in parse_fields(text)
            if not (incoming and field.key in _PREALLOCATION)
        ]
        ours = [
            Field("memory-backend-file"), Field("id", self.id), Field("size", str(self.size)),
            Field("mem-path", f"/proc/self/fd/{fd}"), Field("share", "on"),
        ]  # fmt: skip
        return unparse_fields(ours + extra)


class Hardware(msgspec.Struct, frozen=True):
    """What a command line lets the guest see, memory aside: the same in both QEMUs, or the saved state does not fit.

    `cpu` is the whole value of -cpu; `options` are the options that make or change devices, in their order.
    """

    machine: str
    properties: tuple[str, ...]
    cpu: str
    accelerators: tuple[str, ...]
    options: tuple[str, ...]

    @property
    def cpu_model(self) -> str:
        """The CPU model, without the features that are added or taken away."""
        return self.cpu.partition(",")[0]


class Backend(msgspec.Struct, frozen=True):
    """A memory backend as a command line has it; `size` in bytes, `extra` is what was wanted of it besides."""

    id: str
    kind: str
    size: int
    share: bool
    path: str
    extra: tuple[str, ...] = ()


def hardware(words: Iterable[str]) -> Hardware:
    """Return what the words behind QEMU's name let the guest see. Raises `NotACommandLine`."""
    options = parse(list(words))
    machine = _merged(options, "machine", "M")
    properties = [each for each in machine if each.key not in ("type", "memory-backend", "accel")]
    return Hardware(
        machine=lookup(machine, "type") or "",
        properties=tuple(sorted(str(each) for each in properties)),
        cpu=next((one.value or "" for one in reversed(options) if one.name == "cpu"), ""),
        accelerators=_accelerators(options, machine),
        options=tuple(_seen(option) for option in options if option.name in _SEEN),
    )


def backends(words: Iterable[str]) -> list[Backend]:
    """Return the memory backends that words behind QEMU's name make. Raises `NotACommandLine`."""
    found: list[Backend] = []
    for option in parse(list(words)):
        fields = parse_fields(option.value or "", "qom-type") if option.name == "object" else []
        kind = lookup(fields, "qom-type") or ""
        if kind.startswith("memory-backend-"):
            size, share = lookup(fields, "size"), lookup(fields, "share")
            found.append(
                Backend(
                    id=lookup(fields, "id") or "",
                    kind=kind,
                    size=parse_size(size) if size else 0,
                    share=share is not None and Field("share", share).on,
                    path=lookup(fields, "mem-path") or "",
                    extra=_extra(fields),
                )
            )
    return found


def _extra(fields: Iterable[Field]) -> tuple[str, ...]:
    return tuple(str(field) for field in fields if field.key not in _OURS)


def recorded(words: Sequence[str]) -> tuple[str, ...]:
    """Return the words behind the name of a running QEMU as they go into a record: RAM by its mark, and without what is ours."""
    kept: list[Option] = []
    options = parse(words)
    incoming = any(option.name == "incoming" for option in options)
    for option in options:
        fields = parse_fields(option.value or "", "qom-type") if option.name == "object" else []
        ours = f"id={MONITOR_ID}," in f"{option.value}," or f"chardev={MONITOR_ID}," in f"{option.value},"
        if (
            (option.name == "S" and incoming)
            or option.name == "incoming"
            or (option.name in ("chardev", "mon") and ours)
        ):
            continue
        if (lookup(fields, "qom-type") or "").startswith("memory-backend-"):
            kept.append(Option("object", f"{MARK}{lookup(fields, 'id')}@"))
        else:
            kept.append(option)
    return tuple(word for option in kept for word in option.words())


class Adapted(msgspec.Struct, frozen=True):
    """A command line that is ready for a kexec.

    `words` are the arguments without the binary, with `@LUOD:ID@` where RAM goes. `paused` says that the user wants the guest to be started
    stopped. `notes` say what was changed, for the user.
    """

    binary: str
    words: tuple[str, ...]
    ram: tuple[Ram, ...]
    hardware: Hardware
    paused: bool
    notes: tuple[str, ...] = ()

    def argv(self, fds: Mapping[str, int], monitor: Path, *, incoming: bool = False) -> list[str]:
        """Return the command line to execute. `fds` are the memfds by the id of their RAM, `monitor` is where our monitor listens."""
        return [self.binary, *place(self.words, self.ram, fds, monitor, incoming=incoming)]


def running(argv: Sequence[str]) -> Adapted:
    """Return the command line of a running QEMU as one that can be executed once more. Raises `NotACommandLine`."""
    words = argv[1:]
    return Adapted(
        binary=argv[0],
        words=recorded(words),
        ram=tuple(Ram(one.id, one.size, one.extra) for one in backends(words)),
        hardware=hardware(words),
        paused=False,
    )


def place(
    words: Iterable[str], ram: Iterable[Ram], fds: Mapping[str, int], monitor: Path, *, incoming: bool
) -> list[str]:
    """Put memfds and a monitor into recorded words; `incoming` makes QEMU wait, stopped, for a guest to come in."""
    backends = {f"{MARK}{one.id}@": one.backend(fds[one.id], incoming=incoming) for one in ram}
    socket = unparse_fields(
        [
            Field("socket"),
            Field("id", MONITOR_ID),
            Field("path", str(monitor)),
            Field("server", "on"),
            Field("wait", "off"),
        ]
    )
    ours = ["-chardev", socket, "-mon", f"chardev={MONITOR_ID},mode=control"]
    return [
        *(backends.get(word, word) for word in words),
        *ours,
        *(["-incoming", "defer", "-S"] if incoming else []),
    ]


def adapt(
    argv: Sequence[str],
    capabilities: Capabilities,
    *,
    recorded_machine: str = "",
    file_system: FileSystem | None = None,
) -> Adapted:
    """Make a command line, QEMU's name first, ready for a kexec.

    `recorded_machine` is the machine type that the guest was saved with: an unversioned one on the command line then means that, not
    what this QEMU means by it. Raises `NotAdaptable`, `NotACommandLine`, and of the probe's errors `MachineUnknown` and
    `MachineUnversioned`.
    """
    options = parse(argv[1:])
    return _Adaptation(argv[0], options, capabilities, recorded_machine, file_system).result()


class _Adaptation:
    """One command line on its way."""

    def __init__(
        self,
        binary: str,
        options: list[Option],
        capabilities: Capabilities,
        recorded: str,
        file_system: FileSystem | None,
    ) -> None:
        self.binary = binary
        self.options = options
        self.capabilities = capabilities
        self.recorded = recorded
        self.found = obstacles(options, file_system)
        self.notes: list[str] = []
        self.machine_fields = _merged(options, "machine", "M")
        self.memory_fields = _merged(options, "m")

    def _refuse(self, option: object, why: str, advice: str) -> None:
        self.found.append(Obstacle(str(option), why, advice))

    def result(self) -> Adapted:
        """Return the command line, or raise with everything that stands in its way."""
        for option in self.options:
            if MARK in str(option):
                self._refuse(option, f"{MARK!r} is a word of luo-qemu's own", "call it something else")
        self._check_memory()
        ram = self._ram()
        if self.found:
            raise NotAdaptable(self.found)
        machine = self._machine()
        cpu_words = self._cpu(machine)
        backend = lookup(self.machine_fields, "memory-backend")
        if backend is None and not self._numa_backends():
            backend = ram[0].id
        machine_words = [Field(machine), *(each for each in self.machine_fields if each.key not in ("type", "memory-backend"))]  # fmt: skip
        if backend is not None:
            machine_words.append(Field("memory-backend", backend))
        words = [
            "-machine", unparse_fields(machine_words), "-cpu", cpu_words,
            *(word for one in ram for word in ("-object", f"{MARK}{one.id}@")),
            *(word for option in self.options if not self._replaced(option, ram) for word in option.words()),
        ]  # fmt: skip
        paused = any(option.name == "S" for option in self.options)
        if paused:
            self.notes.append("-S: a new guest waits for `cont` on a monitor of yours")
        return Adapted(
            binary=self.binary,
            words=tuple(words),
            ram=tuple(ram),
            hardware=hardware(words),
            paused=paused,
            notes=tuple(self.notes),
        )

    def _replaced(self, option: Option, ram: Sequence[Ram]) -> bool:
        """Say whether an option is in the result in another form, or not at all."""
        if option.name in ("machine", "M", "cpu", "mem-prealloc"):
            return True
        if option.name == "object":
            return lookup(parse_fields(option.value or "", "qom-type"), "id") in {one.id for one in ram}
        return False

    # -- memory

    def _check_memory(self) -> None:
        if any(lookup(self.memory_fields, key) not in (None, "0") for key in ("slots", "maxmem")):
            self._refuse(
                "-m slots=,maxmem=", "memory that is plugged in later is not carried over",
                "give the guest all of its memory at once, and leave out slots and maxmem",
            )  # fmt: skip
        for option in self.options:
            if option.name == "numa" and lookup(parse_fields(option.value or "", "type"), "mem"):
                self._refuse(option, "mem= makes RAM of QEMU's own", "name a memory-backend-memfd by memdev=")

    def _numa_backends(self) -> list[str]:
        return [
            backend
            for option in self.options
            if option.name == "numa"
            and (backend := lookup(parse_fields(option.value or "", "type"), "memdev"))
        ]

    def _ram(self) -> list[Ram]:
        """Return every piece of RAM: those that the user has named, else the one of -m."""
        objects = {
            name: (option, fields)
            for option in self.options
            if option.name == "object"
            for fields in [parse_fields(option.value or "", "qom-type")]
            if (lookup(fields, "qom-type") or "").startswith("memory-backend-")
            and (name := lookup(fields, "id"))
        }
        named = [
            *filter(None, [lookup(self.machine_fields, "memory-backend")]),
            *dict.fromkeys(self._numa_backends()),
        ]
        for name, (option, _) in objects.items():
            if name not in named:
                self._refuse(
                    option, "it is not the RAM of the machine", "leave it out, or name it by memory-backend="
                )
        if not named:
            taken = {lookup(parse_fields(option.value or ""), "id") for option in self.options if option.name == "object"}  # fmt: skip
            name = next(name for number in range(len(taken) + 1) if (name := f"ram{number}") not in taken)
            size = lookup(self.memory_fields, "size")
            count = parse_size(size, "m") if size else DEFAULT_RAM
            self.notes.append(f"RAM of {count >> 20} MiB lies in a memfd")
            extra = ("prealloc=on",) if any(one.name == "mem-prealloc" for one in self.options) else ()
            return [Ram(name, -(-count // _RAM_STEP) * _RAM_STEP, extra)]
        return [one for name in named if (one := self._named_ram(name, objects)) is not None]

    def _named_ram(self, name: str, objects: Mapping[str, tuple[Option, list[Field]]]) -> Ram | None:
        if name not in objects:
            advice = f"-object memory-backend-memfd,id={name},size=..."
            self._refuse(f"memory-backend={name}", "there is no such object", advice)
            return None
        option, fields = objects[name]
        kind, size = lookup(fields, "qom-type") or "", lookup(fields, "size")
        if any(field.key == "hugetlb" and field.on for field in fields):
            self._refuse(option, "the kernel does not carry huge pages over", "leave out hugetlb")
        elif lookup(fields, "mem-path"):
            self._refuse(
                option, "RAM in a file of a given path cannot be carried over, only memfds can",
                f"-object memory-backend-memfd,id={name},size=...: luo-qemu puts it into a memfd",
            )  # fmt: skip
        elif any(field.key in ("readonly", "pmem", "discard-data") and field.on for field in fields):
            self._refuse(
                option, "readonly, pmem and discard-data do not leave RAM as it is", "leave them out"
            )
        elif size is None or len(name.encode()) > _LONGEST_ID:
            self._refuse(option, "it has no size, or an id of more than 64 bytes", "id=ram0,size=4G")
        else:
            count = parse_size(size)
            if count % _PAGE:
                self._refuse(option, f"its size is not a multiple of {_PAGE}", "give a size in MiB or GiB")
            self.notes.append(f"RAM {name} ({kind}, {count >> 20} MiB) lies in a memfd")
            extra = _extra(fields)
            if any(one.name == "mem-prealloc" for one in self.options):
                extra = (*extra, "prealloc=on")
            return Ram(name, count, extra)
        return None

    # -- machine and CPU

    def _machine(self) -> str:
        wanted = lookup(self.machine_fields, "type") or ""
        name = wanted or self.capabilities.default_machine
        recorded = self.recorded
        if recorded and name in self.capabilities.aliases and _family(recorded) == _family(self.capabilities.aliases[name]):  # fmt: skip
            return self.capabilities.pin(recorded)
        pinned = self.capabilities.pin(name)
        if pinned != wanted:
            self.notes.append(f"machine type {pinned}{f' for {wanted}' if wanted else ''}")
        return pinned

    def _cpu(self, machine: str) -> str:
        given = next((option.value for option in reversed(self.options) if option.name == "cpu"), None)
        if given:
            return given
        default = self.capabilities.default_cpus.get(machine, "")
        if not default:
            raise NotAdaptable(
                [Obstacle("-cpu", f"it is missing, and {machine} has no default", "name a CPU model by -cpu")]
            )
        self.notes.append(f"CPU model {default}")
        return default


def _merged(options: Iterable[Option], *names: str) -> list[Field]:
    """Return the fields of all options of a name; QEMU merges them, and the last one counts."""
    first = FIRST_KEYS[names[0]]
    return [
        field
        for option in options
        if option.name in names
        for field in parse_fields(option.value or "", first)
    ]


def _accelerators(options: Sequence[Option], machine: Sequence[Field]) -> tuple[str, ...]:
    given = [
        lookup(parse_fields(one.value or "", "accel"), "accel") or ""
        for one in options
        if one.name == "accel"
    ]
    if any(option.name == "enable-kvm" for option in options):
        given.append("kvm")
    if not given:
        given = (lookup(machine, "accel") or "").split(":")
    return tuple(filter(None, given))


def _family(machine: str) -> str:
    """Return a machine type without its version: `pc-q35` for `pc-q35-10.0`."""
    return machine.rpartition("-")[0]


_HOST_ONLY: dict[str, Callable[[Field], bool]] = {
    "drive": lambda field: field.key in ("file", "cache", "aio", "discard", "detect-zeroes", "cache.direct"),
}


def _seen(option: Option) -> str:
    """Return what the guest can see of an option: a serial port, but not where its words go."""
    if option.name in ("serial", "parallel", "debugcon"):
        return f"-{option.name}{' none' if option.value == 'none' else ''}"
    if option.name in ("hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "mtdblock", "sd", "pflash"):
        return f"-{option.name}"
    hidden = _HOST_ONLY.get(option.name)
    if hidden is not None and option.value is not None:
        fields = parse_fields(option.value, FIRST_KEYS[option.name])
        return f"-{option.name} {unparse_fields(field for field in fields if not hidden(field))}"
    return str(option)
