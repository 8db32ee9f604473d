# SPDX-License-Identifier: Apache-2.0
"""Building a kernel: what is missing is said at once, stages are done once, and an interrupted build continues."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from luod.lab import build, debsource
from luod.lab.errors import BuildFailed, LabUnavailable

INDEX = """MetaKey: main/binary-amd64/Packages
Origin: Debian
Label: Debian-Security
Component: main
Repo-URI: http://security.invalid/

MetaKey: contrib/binary-amd64/Packages
Origin: Debian
Label: Debian
Component: contrib
Repo-URI: http://contrib.invalid/debian/

MetaKey: main/binary-amd64/Packages
Origin: Debian
Label: Debian
Component: main
Repo-URI: http://mirror.invalid/debian/
"""


class Recorder:
    """A reporter that remembers which stages ran."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []

    def stage(self, name, detail="") -> None:
        self.stages.append(name)

    def advance(self, share, detail) -> None:
        assert share >= 0

    def note(self, text) -> None:
        self.notes.append(text)


FAKE_MAKE = """#!/bin/sh
# Stands for make: writes what the target would, and fails when told to.
dir=$2
for target; do :; done
echo "  CC      $target"
[ -e "$dir/break-$target" ] && { echo "error: $target is broken"; exit 2; }
case $target in
olddefconfig) [ -e "$dir/drop" ] && sed -i "/$(cat "$dir/drop")/d" "$dir/.config" ;;
bzImage) mkdir -p "$dir/arch/x86/boot" && cp "$dir/image" "$dir/arch/x86/boot/bzImage" ;;
esac
exit 0
"""


@pytest.fixture
def builder(tmp_path, monkeypatch, image):
    """Give a build a make and a source package of its own; returns a function that builds and tells the stages it ran."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "make").write_text(FAKE_MAKE)
    (tools / "make").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setattr(build, "missing_packages", list)
    package = source_package(tmp_path, image)
    monkeypatch.setattr(debsource, "locate", lambda name, directory, suite: ("7.3.4-1", None))

    def download(name, version, directory, config):
        directory.mkdir(parents=True, exist_ok=True)
        target = directory / f"{name}_{version}_all.deb"
        target.write_bytes(package.read_bytes())
        return target

    monkeypatch.setattr(debsource, "download", download)

    def go(**options):
        recorder = Recorder()
        try:
            built = build.build_kernel("7.3", cache=tmp_path / "cache", jobs=1, progress=recorder, **options)
        except BuildFailed as error:
            return recorder.stages, error
        return recorder.stages, built

    go.tree = tmp_path / "cache/build/linux-7.3/source"
    return go


def source_package(place: Path, image: Callable[..., Path]) -> Path:
    """Make a package as Debian's: one tarball inside, with the source in a top directory."""
    top = place / "linux-source-7.3"
    top.mkdir()
    image(top / "image", "7.3.4-luo")
    inside = place / "deb/usr/src"
    inside.mkdir(parents=True)
    (place / "deb/DEBIAN").mkdir()
    (place / "deb/DEBIAN/control").write_text(
        "Package: linux-source-7.3\nVersion: 7.3.4-1\nArchitecture: all\nMaintainer: lab <lab@invalid>\nDescription: a source\n"
    )
    subprocess.run(["tar", "-cJf", inside / "linux-source-7.3.tar.xz", "-C", place, top.name], check=True)
    package = place / "made.deb"
    subprocess.run(
        ["dpkg-deb", "--build", "--root-owner-group", place / "deb", package], check=True, capture_output=True
    )
    return package


needs_dpkg = pytest.mark.skipif(not Path("/usr/bin/dpkg-deb").exists(), reason="dpkg-deb is not installed")


@needs_dpkg
def test_build_goes_through_all_stages_and_cleans_up(builder, tmp_path) -> None:
    stages, built = builder()
    assert stages == ["find", "fetch", "unpack", "configure", "compile", "install"]
    assert built.path == tmp_path / "cache/kernels/bzImage-7.3.4"
    assert not builder.tree.parent.exists()


@needs_dpkg
def test_failed_build_continues_where_it_stopped(builder, monkeypatch) -> None:
    monkeypatch.setattr(build, "SPACE_NEEDED", 0)
    builder(keep=True)
    (builder.tree.parent / "compile.stamp").unlink()
    (builder.tree / "break-bzImage").touch()
    stages, error = builder(keep=True)
    assert stages == ["compile"]
    assert isinstance(error, BuildFailed)
    assert "error: bzImage is broken" in str(error)
    assert "build.log" in error.hint
    (builder.tree / "break-bzImage").unlink()
    stages, built = builder(keep=True)
    assert stages == ["compile", "install"]
    assert built.version == "7.3.4"


@needs_dpkg
def test_other_options_configure_and_compile_again_but_do_not_fetch(builder, monkeypatch) -> None:
    builder(keep=True)
    monkeypatch.setattr(build, "fragment", lambda: "CONFIG_MODULES=n\n")
    stages, _ = builder(keep=True)
    assert stages == ["configure", "compile", "install"]


@needs_dpkg
def test_options_that_the_kernel_drops_are_an_error(builder) -> None:
    builder(keep=True)
    (builder.tree / "drop").write_text("CONFIG_LIVEUPDATE=y")
    (builder.tree.parent / "configure.stamp").unlink()
    _, error = builder(keep=True)
    assert isinstance(error, BuildFailed)
    assert "does not accept 1 of the lab's options: CONFIG_LIVEUPDATE=y" in str(error)


@needs_dpkg
def test_interrupted_unpacking_leaves_no_tree(builder, monkeypatch, tmp_path) -> None:
    def truncated(name, version, directory, config):
        directory.mkdir(parents=True, exist_ok=True)
        target = directory / f"{name}_{version}_all.deb"
        target.write_bytes((tmp_path / "made.deb").read_bytes()[:-200])
        return target

    monkeypatch.setattr(debsource, "download", truncated)
    _, error = builder()
    assert isinstance(error, BuildFailed)
    assert not builder.tree.exists()


def test_all_missing_packages_are_named_in_one_message(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = build.missing_packages(tmp_path)
    assert {
        "flex",
        "bison",
        "bc",
        "cpio",
        "zstd",
        "gcc",
        "make",
        "xz-utils",
        "libelf-dev",
        "libssl-dev",
    } <= set(missing)
    monkeypatch.setattr(build, "missing_packages", lambda: missing)
    with pytest.raises(LabUnavailable) as caught:
        build.build_kernel(cache=tmp_path)
    assert caught.value.hint == f"apt-get install {' '.join(missing)}"


def test_too_little_space_is_said_before_anything_starts(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(build, "missing_packages", list)
    monkeypatch.setattr(build, "SPACE_NEEDED", 1 << 62)
    with pytest.raises(LabUnavailable, match="MiB free"):
        build.build_kernel(cache=tmp_path, progress=Recorder())


def test_mirror_is_the_main_archive_of_this_machine() -> None:
    assert debsource.parse_mirror(INDEX) == "http://mirror.invalid/debian"
    assert debsource.parse_mirror("") == ""


def test_fragment_sets_what_the_lab_needs() -> None:
    options = build.fragment().splitlines()
    for option in (
        "KEXEC_HANDOVER",
        "LIVEUPDATE",
        "LIVEUPDATE_MEMFD",
        "9P_FS",
        "VIRTIO_CONSOLE",
        "EXT4_FS",
        "MEMCG",
    ):
        assert f"CONFIG_{option}=y" in options
