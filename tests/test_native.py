"""Building `csrc/`: with tools, without, and what the loader says of what it finds."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from mv2v_engine.errors import KernelUnavailableError
from mv2v_engine.machine import describe_machine
from mv2v_engine.ops import native
from mv2v_engine.ops.fov_overlap import fov_overlap

ROOT = Path(__file__).resolve().parents[1]
OPS = Path("mv2v_engine/ops")
CXX = shutil.which("g++") or shutil.which("clang++")
NVCC = shutil.which("nvcc")
needs_cxx = pytest.mark.skipif(CXX is None, reason="no C++ compiler (g++ or clang++)")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The part of the repository that an install of `ops` needs."""
    copy = tmp_path / "project"
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    ignored = shutil.ignore_patterns("libmv2v_*", "__pycache__")
    shutil.copytree(ROOT / OPS, copy / OPS, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "mv2v_engine/__init__.py"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def run_tool(project: Path, *arguments: str, **variables: str) -> str:
    """What Python prints in the copy; CXX="" is unset, and PATH may be empty."""
    chosen = {**os.environ, "CXX": "", "NVCC": "/nowhere/nvcc", **variables}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=project,
        env={name: value for name, value in chosen.items() if value or name == "PATH"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(project: Path, **variables: str) -> Path:
    """Build a wheel as pip does it, offline."""
    out = project / "out"
    out.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    run_tool(project, "-c", code, **variables)
    (wheel,) = out.glob("*.whl")
    return wheel


def test_the_abi_version_is_the_headers() -> None:
    header = (ROOT / "csrc/mv2v.h").read_text(encoding="utf-8")
    assert re.findall(r"#define MV2V_ABI_VERSION (\d+)", header) == [str(native.ABI_VERSION)]


def test_pip_installs_without_any_tool_and_info_says_why_torch_works(project: Path) -> None:
    ignored = shutil.ignore_patterns("libmv2v_*", "__pycache__", "assets")
    shutil.copytree(
        ROOT / "mv2v_engine", project / "mv2v_engine", ignore=ignored, dirs_exist_ok=True
    )
    stale = project / OPS / "libmv2v_cpu.so"
    stale.write_bytes(b"from an earlier install")
    # what this environment has installed stays as it is, and nothing is fetched
    apart = ["--prefix", str(project / "prefix"), "--ignore-installed", "--no-index"]
    offline = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    run_tool(project, "-m", "pip", "install", *apart, *offline, "-e", ".", PATH="")
    assert not stale.exists()
    assert list((project / "prefix").rglob("mv2v_engine-*.dist-info"))
    said = run_tool(project, "-m", "mv2v_engine.run", "info", PATH="", PYTHONPATH=str(project))
    assert (
        "cpu: PyTorch is used, libmv2v_cpu.so was not built: "
        "no C++ compiler (g++ or clang++) was found on the PATH"
    ) in said
    assert (
        "cuda: PyTorch is used, libmv2v_cuda.so was not built: "
        "/nowhere/nvcc cannot be run: No such file or directory"
    ) in said


def test_a_compiler_that_fails_is_quoted(project: Path) -> None:
    broken = project / "broken"
    broken.write_text("#!/bin/sh\necho out of cheese >&2\nexit 3\n", encoding="utf-8")
    broken.chmod(0o755)
    with zipfile.ZipFile(build_wheel(project, CXX=str(broken))) as wheel:
        names = set(wheel.namelist())
        reason = wheel.read((OPS / "libmv2v_cpu.skipped").as_posix()).decode()
    assert reason == f"{broken} failed: out of cheese\n"
    assert not any(name.endswith(".so") for name in names)


@needs_cxx
def test_a_wheel_holds_the_library_and_the_other_ones_reason(project: Path) -> None:
    with zipfile.ZipFile(build_wheel(project, CXX=str(CXX))) as wheel:
        names = {name for name in wheel.namelist() if "libmv2v" in name}
        extracted = wheel.extract((OPS / "libmv2v_cpu.so").as_posix(), project / "unpacked")
    assert names == {(OPS / name).as_posix() for name in ("libmv2v_cpu.so", "libmv2v_cuda.skipped")}
    library = native.open_library(Path(extracted))
    assert isinstance(library, ctypes.CDLL)
    assert library.mv2v_fov_overlap_cpu


@needs_cxx
def test_another_abi_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "libmv2v_cpu.so"
    command = [str(CXX), "-shared", "-fPIC", "-DMV2V_ABI_VERSION=999", "-o", str(path)]
    subprocess.run([*command, str(ROOT / "csrc/cpu/library.cpp")], check=True)
    assert native.open_library(path) == (
        f"libmv2v_cpu.so has ABI version 999, expected {native.ABI_VERSION}; "
        "install again with `pip install -e .`"
    )


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "libmv2v_cpu.so"
    assert "never built; install again" in str(native.open_library(path))
    path.write_bytes(b"not an ELF file")
    assert "libmv2v_cpu.so cannot be loaded: " in str(native.open_library(path))


def test_without_a_library_torch_does_the_work_and_info_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "_library", lambda name: f"libmv2v_{name}.so lies on the moon")
    points = torch.randn(50, 3, dtype=torch.float64)
    planes = torch.randn(4, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(
        fov_overlap(points, planes, frames=[2, 2]),
        fov_overlap(points, planes, frames=[2, 2], backend="reference"),
    )
    assert native.missing_reason("cpu", "fov_overlap") == "libmv2v_cpu.so lies on the moon"
    with pytest.raises(KernelUnavailableError, match=r"fov_overlap cannot run natively.*moon"):
        native.call("cpu", "fov_overlap")
    text = describe_machine()
    assert "cpu: PyTorch is used, libmv2v_cpu.so lies on the moon" in text
    assert "cuda: PyTorch is used, libmv2v_cuda.so lies on the moon" in text


@pytest.mark.skipif(native.missing_reason("cpu") is not None, reason="libmv2v_cpu was not built")
def test_error_codes_become_errors() -> None:
    assert native.missing_reason("cpu", "attention") == "libmv2v_cpu has no attention"
    assert f"cpu: libmv2v_cpu, ABI {native.ABI_VERSION}" in native.describe("cpu")
    with pytest.raises(KernelUnavailableError, match=r"invalid argument \(code -1\)"):
        call_with_no_points("cpu")


def call_with_no_points(name: native.LibraryName, num_videos: int = 0) -> None:
    """Valid pointers to one word each; what they mean is for the callee to refuse."""
    word = torch.zeros(4, dtype=torch.int64)
    pointer, zero = ctypes.c_void_p(word.data_ptr()), ctypes.c_int64(0)
    last = (ctypes.c_int(1), pointer) if name == "cpu" else (pointer, ctypes.c_void_p(None))
    shape = (zero, zero, zero)
    videos = ctypes.c_int64(num_videos)
    native.call(name, "fov_overlap", pointer, *shape, pointer, zero, pointer, videos, *last)


@pytest.mark.skipif(native.missing_reason("cuda") is not None, reason="libmv2v_cuda was not built")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_the_cuda_library_loads_without_a_driver_and_returns_an_error() -> None:
    with pytest.raises(KernelUnavailableError, match=r"invalid argument \(code -1\)"):
        call_with_no_points("cuda")
    with pytest.raises(KernelUnavailableError, match=r"libmv2v_cuda: .* \(code (35|100)\)"):
        call_with_no_points("cuda", num_videos=1)


@needs_nvcc
def test_no_cuda_kernel_spills(tmp_path: Path) -> None:
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        command = [str(NVCC), "-O3", "-std=c++17", "-cubin", "-arch=sm_90a", "-Xptxas", "-v"]
        done = subprocess.run(
            [*command, "-o", str(tmp_path / "kernel.cubin"), str(source)],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        said = done.stdout + done.stderr
        if "__global__" in source.read_text(encoding="utf-8"):
            assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
        for stores, loads in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill", said):
            assert (stores, loads) == ("0", "0"), said
