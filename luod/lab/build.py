# SPDX-License-Identifier: Apache-2.0
"""Building a lab kernel from Debian's source package, in stages that an interrupted build continues from.

    fetch -> unpack -> configure -> compile -> install

Each stage that is over leaves a stamp with a digest of what went into it (package version, options), so that a second run does only
what is left, and a change of the options redoes only what depends on them. `make` itself continues inside the compile stage.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from . import debsource
from .errors import BuildFailed, LabUnavailable
from .images import KernelImage, cache_root, read_image
from .progress import PlainReporter, Reporter

DEFAULT_VERSION = "7.3"
SPACE_NEEDED = 4 << 30
"""Bytes of disk that source tree and object files take at most; the image is 7 MB."""
OBJECTS_EXPECTED = 2650
"""Lines that `make bzImage` prints for the lab's options, measured on 7.3.4; only a progress bar depends on it."""

TOOLS = {
    "apt-get": "apt", "dpkg-deb": "dpkg", "tar": "tar", "xz": "xz-utils", "gcc": "gcc", "ld": "binutils", "make": "make",
    "flex": "flex", "bison": "bison", "bc": "bc", "cpio": "cpio", "zstd": "zstd", "perl": "perl",
}  # fmt: skip
HEADERS = {"stdio.h": "libc6-dev", "gelf.h": "libelf-dev", "openssl/opensslv.h": "libssl-dev"}


@dataclass(frozen=True)
class BuildPlan:
    """Where a build happens and what it is made from."""

    package: str
    directory: Path
    images: Path
    fragment: str
    jobs: int

    @property
    def tree(self) -> Path:
        """The unpacked source."""
        return self.directory / "source"

    @property
    def log(self) -> Path:
        """Everything that make printed."""
        return self.directory / "build.log"


def missing_packages(include: Path = Path("/usr/include")) -> list[str]:
    """Return the Debian packages that a build needs and this machine lacks, all at once."""
    missing = {package for tool, package in TOOLS.items() if shutil.which(tool) is None}
    for header, package in HEADERS.items():
        if not (include / header).exists() and not any(include.glob(f"*-linux-gnu/{header}")):
            missing.add(package)
    return sorted(missing)


def fragment() -> str:
    """Return the kernel options that the lab sets."""
    return resources.files("luod.lab").joinpath("kernel.fragment").read_text(encoding="utf-8")


def build_kernel(
    version: str = DEFAULT_VERSION,
    *,
    suite: str | None = None,
    jobs: int | None = None,
    keep: bool = False,
    cache: Path | None = None,
    progress: Reporter | None = None,
) -> KernelImage:
    """Build Linux `version` ("7.3": Debian's package linux-source-7.3) and return the image, which is in the cache.

    An unfinished build of the same version continues. `keep` leaves the source tree (3 GB) in place afterwards.
    Raises `LabUnavailable` when packages, space or the source are missing, and `BuildFailed` when a stage fails.
    """
    report = progress or PlainReporter()
    missing = missing_packages()
    if missing:
        raise LabUnavailable(
            f"building a kernel needs {len(missing)} more packages: {' '.join(missing)}",
            hint=f"apt-get install {' '.join(missing)}",
        )
    series = ".".join(version.split(".")[:2])
    root = cache or cache_root()
    plan = BuildPlan(
        package=f"linux-source-{series}",
        directory=root / "build" / f"linux-{series}",
        images=root / "kernels",
        fragment=fragment(),
        jobs=jobs or os.cpu_count() or 1,
    )
    plan.directory.mkdir(parents=True, exist_ok=True)
    _require_space(plan)
    return _run_stages(plan, version, suite, keep, report)


def _run_stages(
    plan: BuildPlan, version: str, suite: str | None, keep: bool, report: Reporter
) -> KernelImage:
    package = plan.directory / "package"
    source, config = "", None
    if _stamp(plan, "fetch"):
        # An unfinished build goes on with the source it began with, and needs no network for it.
        source = debsource.version_of(package, plan.package)
    if not source:
        report.stage("find", plan.package)
        source, config = debsource.locate(plan.package, plan.directory, suite)
    if version.count(".") > 1 and not source.startswith(f"{version}-"):
        raise LabUnavailable(
            f"{plan.package} is at {source}, not {version}",
            hint=f"build {source.split('-')[0]}, or name another --suite",
        )

    def fetch() -> None:
        debsource.download(plan.package, source, package, config)

    def unpack() -> None:
        _unpack(plan, debsource.newest_package(package, plan.package))

    def configure() -> None:
        (plan.tree / ".config").write_text(plan.fragment, encoding="utf-8")
        _make(plan, report, "olddefconfig")
        _require_options(plan)

    inputs = source
    for name, detail, action in (
        ("fetch", f"{plan.package} {source} (about 160 MB)", fetch),
        ("unpack", "dpkg-deb, xz, tar", unpack),
        ("configure", "olddefconfig", configure),
        ("compile", f"make -j{plan.jobs} bzImage, log {plan.log}", lambda: _make(plan, report, "bzImage")),
    ):
        if name == "configure":
            inputs += plan.fragment
        _stage(plan, name, detail, inputs, action, report)
    report.stage("install")
    built = read_image(plan.tree / "arch/x86/boot/bzImage")
    plan.images.mkdir(parents=True, exist_ok=True)
    target = plan.images / f"bzImage-{built.version}"
    partial = target.with_suffix(".partial")
    shutil.copyfile(built.path, partial)
    partial.replace(target)
    if not keep:
        shutil.rmtree(plan.directory)
    return read_image(target)


def _stage(
    plan: BuildPlan, name: str, detail: str, inputs: str, action: Callable[[], None], report: Reporter
) -> None:
    digest = hashlib.sha256(inputs.encode()).hexdigest()
    if _stamp(plan, name) == digest:
        report.note(f"{name}: done before")
        return
    report.stage(name, detail)
    action()
    (plan.directory / f"{name}.stamp").write_text(digest, encoding="ascii")


def _stamp(plan: BuildPlan, name: str) -> str:
    try:
        return (plan.directory / f"{name}.stamp").read_text(encoding="ascii")
    except FileNotFoundError:
        return ""


def _require_space(plan: BuildPlan) -> None:
    free = shutil.disk_usage(plan.directory).free
    if not (plan.directory / "compile.stamp").exists() and not plan.tree.exists() and free < SPACE_NEEDED:
        raise LabUnavailable(
            f"{plan.directory} has {free >> 20} MiB free, a kernel build takes up to {SPACE_NEEDED >> 20} MiB",
            hint="free some space or set XDG_CACHE_HOME to a larger file system",
        )


def _unpack(plan: BuildPlan, package: Path) -> None:
    """Unpack the tarball inside the package next to its place, then move it there: the tree is whole or absent."""
    fresh = plan.directory / "source.partial"
    for old in (fresh, plan.tree):
        if old.exists():
            shutil.rmtree(old)
    fresh.mkdir(parents=True)
    # The package holds one tarball; three programs in a row keep 1.6 GB of it out of memory and off the disk.
    commands: Sequence[Sequence[str]] = (
        ("dpkg-deb", "--fsys-tarfile", str(package)),
        ("tar", "-xO", f"./usr/src/{plan.package}.tar.xz"),
        ("tar", "-xJ", "--strip-components=1", "-C", str(fresh)),
    )
    running: list[subprocess.Popen[bytes]] = []
    with plan.log.open("ab") as log, contextlib.ExitStack() as stack:
        try:
            for number, command in enumerate(commands):
                process = subprocess.Popen(
                    command,
                    stdin=running[-1].stdout if running else subprocess.DEVNULL,
                    stdout=log if number == len(commands) - 1 else subprocess.PIPE,
                    stderr=log,
                )
                stack.enter_context(process)
                if running and running[-1].stdout is not None:
                    running[
                        -1
                    ].stdout.close()  # so that a program upstream hears of the end of the one that reads it
                running.append(process)
            codes = [process.wait() for process in running]
        except BaseException:
            for process in running:
                process.kill()
            raise
    if any(codes):
        raise BuildFailed(
            f"unpacking {package.name} failed, see {plan.log}",
            hint=f"delete {plan.directory} and start again",
        )
    fresh.replace(plan.tree)


def _make(plan: BuildPlan, report: Reporter, target: str) -> None:
    """Run make in a process group of its own, so that an interrupt ends the compilers with it."""
    command = [
        "make",
        "-C",
        str(plan.tree),
        f"-j{plan.jobs}",
        "KBUILD_BUILD_USER=luod",
        "KBUILD_BUILD_HOST=lab",
    ]
    command.append(target)
    environment = {**os.environ, "LC_ALL": "C"}
    tail: deque[str] = deque(maxlen=15)
    with (
        plan.log.open("a", encoding="utf-8") as log,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", env=environment, start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            assert process.stdout is not None
            for count, line in enumerate(process.stdout):
                log.write(line)
                tail.append(line)
                report.advance(count / OBJECTS_EXPECTED, line.strip())
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    code = process.returncode
    if code:
        raise BuildFailed(
            f"make {target} failed ({code}):\n{''.join(tail)}", hint=f"the whole log is {plan.log}"
        )


def _require_options(plan: BuildPlan) -> None:
    """Refuse a configuration that silently lost an option, as happens when one of its dependencies has changed."""
    have = set((plan.tree / ".config").read_text(encoding="utf-8").splitlines())
    lost: list[str] = []
    for line in plan.fragment.splitlines():
        name, _, value = line.partition("=")
        if name.startswith("CONFIG_"):
            kept = line in have if value != "n" else f"{name}=y" not in have
            lost += [] if kept else [line]
    if lost:
        raise BuildFailed(
            f"{plan.package} does not accept {len(lost)} of the lab's options: {', '.join(lost)}",
            hint="this kernel names them otherwise; adapt luod/lab/kernel.fragment",
        )
