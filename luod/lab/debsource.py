# SPDX-License-Identifier: Apache-2.0
"""Getting packages through Debian's apt without root: `linux-source-X.Y`, and a newer QEMU with all that it needs.

The package is first looked for in what the machine's own apt knows. A kernel newer than the installed release lives in a suite that
is often not configured; then a private set of package lists (under the build directory, this user's, signatures checked with Debian's
keyring) is made for the suite, on the very mirror the machine already uses.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from .errors import BuildFailed, LabUnavailable

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DEFAULT_SUITE = "trixie-backports"


def _apt(
    *arguments: str, config: Path | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    if config is not None:
        environment["APT_CONFIG"] = str(config)
    try:
        return subprocess.run(
            arguments, env=environment, cwd=cwd, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise LabUnavailable(
            f"{arguments[0]} is not here: kernels are built from Debian's source package",
            hint="build on Debian, or put a ready bzImage-VERSION into the kernels directory",
        ) from error


def parse_mirror(targets: str) -> str:
    """Read the main archive's address out of `apt-get indextargets`; empty when there is none."""
    for stanza in targets.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line)
        if (
            fields.get("Origin") == "Debian"
            and fields.get("Label") == "Debian"
            and fields.get("Component") == "main"
        ):
            return fields.get("Repo-URI", "").rstrip("/")
    return ""


def mirror() -> str:
    """Return the address of the Debian archive that this machine's apt uses.

    Raises `LabUnavailable` when apt knows none.
    """
    found = parse_mirror(_apt("apt-get", "indextargets").stdout)
    if not found:
        raise LabUnavailable(
            "apt has no package lists of Debian's main archive",
            hint="run `apt-get update` as root once, then try again",
        )
    return found


def private_lists(directory: Path, suite: str, *, status: Path = Path("/var/lib/dpkg/status")) -> Path:
    """Make this user's own apt lists of a suite, or of several, and return the configuration file to use them with.

    `status` is the list of what counts as installed. Raises `LabUnavailable` when the lists cannot be fetched or do not verify.
    """
    root = directory / "apt"
    for name in ("state/lists/partial", "cache/archives/partial"):
        (root / name).mkdir(parents=True, exist_ok=True)
    sources = root / "suite.sources"
    sources.write_text(
        f"Types: deb\nURIs: {mirror()}\nSuites: {suite}\nComponents: main\nSigned-By: {KEYRING}\n",
        encoding="utf-8",
    )
    config = root / "apt.conf"
    lines = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "-",
        "Dir::State": root / "state",
        "Dir::State::status": status,
        "Dir::Cache": root / "cache",
        "APT::Sandbox::User": "",
    }
    config.write_text("".join(f'{key} "{value}";\n' for key, value in lines.items()), encoding="utf-8")
    update = _apt("apt-get", "update", "-o", "APT::Update::Error-Mode=any", config=config)
    if update.returncode:
        raise LabUnavailable(
            f"cannot fetch the package lists of {suite}: {_last_line(update.stderr)}",
            hint=f"add the suite {suite} to this machine's apt sources, or name another with --suite",
        )
    return config


def candidate(package: str, config: Path | None = None, *, suite: str = "") -> str:
    """Return the version of a package that apt would fetch (from a suite that is not the default one, if named), or an empty string."""
    prefer = ["-t", suite] if suite else []
    policy = _apt("apt-cache", "policy", *prefer, package, config=config).stdout
    match = re.search(r"^\s*Candidate: (\S+)$", policy, re.MULTILINE)
    return "" if match is None or match.group(1) == "(none)" else match.group(1)


def locate(package: str, directory: Path, suite: str | None) -> tuple[str, Path | None]:
    """Find where a package comes from: its version, and the apt configuration to fetch it with (None: the machine's own).

    `suite` limits the search to that suite. Raises `LabUnavailable`, saying which suite to add.
    """
    version = candidate(package) if suite is None else ""
    if version:
        return version, None
    wanted = suite or DEFAULT_SUITE
    config = private_lists(directory, wanted)
    version = candidate(package, config)
    if not version:
        raise LabUnavailable(
            f"neither this machine's apt sources nor {wanted} have {package}",
            hint=f"name a suite that has it with --suite (backports of the next release have the newest kernels, such as "
            f"{DEFAULT_SUITE}), or choose another --version",
        )
    return version, config


def download(package: str, version: str, directory: Path, config: Path | None) -> Path:
    """Fetch a package into a directory; a partly fetched file is continued. Raises `BuildFailed`."""
    directory.mkdir(parents=True, exist_ok=True)
    done = _apt("apt-get", "download", "-q", f"{package}={version}", config=config, cwd=directory)
    if done.returncode:
        raise BuildFailed(
            f"cannot fetch {package} {version}: {_last_line(done.stderr)}",
            hint="check the network and try again: it continues",
        )
    return newest_package(directory, package)


def closure(package: str, suite: str, config: Path, directory: Path) -> list[Path]:
    """Fetch a package of a suite and everything that it depends on, whatever is installed here; return the files.

    Raises `BuildFailed`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    options = ("-q", "-y", "--download-only", "--no-install-recommends", "-t", suite)
    where = ("-o", f"Dir::Cache::archives={directory}")
    (directory / "partial").mkdir(exist_ok=True)
    done = _apt("apt-get", "install", *options, *where, package, config=config)
    if done.returncode:
        raise BuildFailed(
            f"cannot fetch {package} of {suite} with its dependencies: {_last_line(done.stderr)}",
            hint="check the network and try again",
        )
    return sorted(directory.glob("*.deb"))


def newest_package(directory: Path, package: str) -> Path:
    """Return the file of a package that was fetched last. Raises `BuildFailed` when there is none."""
    files = sorted(directory.glob(f"{package}_*.deb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise BuildFailed(
            f"there is no file of {package} in {directory}", hint=f"delete {directory.parent} and start again"
        )
    return files[-1]


def version_of(directory: Path, package: str) -> str:
    """Return the version of the package file in a directory; empty when there is none that can be read."""
    try:
        file = newest_package(directory, package)
    except BuildFailed:
        return ""
    return _apt("dpkg-deb", "--field", str(file), "Version").stdout.strip()


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"
