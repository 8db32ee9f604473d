# SPDX-License-Identifier: Apache-2.0
"""Finding kernel images by what their boot header says."""

from __future__ import annotations

import pytest

from luod.lab.errors import BadImage, NoSuchKernel
from luod.lab.images import available, choose_pair, find_image, kernels_directory, read_image


@pytest.fixture
def kernels(tmp_path, monkeypatch, image):
    monkeypatch.setenv("LUOD_LAB_KERNELS", str(tmp_path))
    for version in ("7.10.1", "7.3.4", "7.2.12"):
        image(tmp_path / f"bzImage-{version}", f"{version}-luo")
    return tmp_path


def test_version_is_read_from_the_header_not_from_the_name(image, tmp_path) -> None:
    found = read_image(image(tmp_path / "bzImage-1.0", "7.3.4-luo"))
    assert (found.version, found.release, found.numbers) == ("7.3.4", "7.3.4-luo", (7, 3, 4))


@pytest.mark.parametrize("bad", [{"magic": b"ELF!"}, {"pointer": 0}])
def test_what_is_no_kernel_is_refused(image, tmp_path, bad) -> None:
    with pytest.raises(BadImage):
        read_image(image(tmp_path / "bzImage-7.3.4", "7.3.4", **bad))


def test_short_files_are_refused(tmp_path) -> None:
    path = tmp_path / "bzImage-7.3.4"
    path.write_bytes(b"HdrS")
    with pytest.raises(BadImage, match="HdrS"):
        read_image(path)


def test_versions_sort_as_numbers(kernels) -> None:
    assert [found.version for found in available()] == ["7.2.12", "7.3.4", "7.10.1"]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("7.3", "7.3.4"), ("7.2.12", "7.2.12"), (None, "7.10.1"), ("7", "7.10.1"), ("7.1", None)],
)
def test_image_by_version(kernels, wanted, found) -> None:
    if found is None:
        with pytest.raises(NoSuchKernel, match=r"found: 7\.2\.12, 7\.3\.4, 7\.10\.1.*build-kernel"):
            find_image(wanted)
    else:
        assert find_image(wanted).version == found


def test_image_by_path(kernels, monkeypatch) -> None:
    assert find_image(str(kernels / "bzImage-7.3.4")).version == "7.3.4"
    monkeypatch.chdir(kernels)
    assert find_image("bzImage-7.3.4").path == kernels / "bzImage-7.3.4"
    with pytest.raises(NoSuchKernel, match="No such file"):
        find_image(str(kernels / "bzImage-9"))


def test_pair_is_oldest_to_newest_unless_said_otherwise(kernels) -> None:
    assert [found.version for found in choose_pair()] == ["7.2.12", "7.10.1"]
    assert [found.version for found in choose_pair("7.3", "7.2")] == ["7.3.4", "7.2.12"]


def test_without_kernels_the_error_says_how_to_get_one(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("LUOD_LAB_KERNELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernels_directory() == tmp_path / "luod/kernels"
    with pytest.raises(NoSuchKernel, match="luoctl lab build-kernel") as caught:
        choose_pair()
    assert caught.value.exit_code == 3


def test_files_that_are_no_kernels_are_left_out_of_the_list(kernels) -> None:
    (kernels / "bzImage-8.0").write_bytes(b"no")
    assert len(available()) == 3
