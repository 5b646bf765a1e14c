"""What `pyproject.toml` cannot say: which packages there are, and how `csrc/` is compiled.

Needs setuptools alone: the libraries are plain C behind ctypes, so no torch, no Python header and
no CUDA torch take part. Both are optional. One that cannot be built leaves its reason beside where
it would lie, as `libmv2v_<name>.skipped`; `python -m mv2v_engine.run info` prints it.

Environment: CXX, NVCC (commands) and MV2V_CUDA_ARCHS ("80;90a;120", the last also as PTX).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
HEADERS = ["csrc/mv2v.h"]
WARNINGS = ["-Wall", "-Wextra"]


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob(f"*{suffix}"))


def find_command(variable: str, *candidates: str) -> list[str] | None:
    """The command in an environment variable, else the first candidate that exists."""
    chosen = os.environ.get(variable)
    if chosen:
        return shlex.split(chosen)
    return next(([found] for found in map(shutil.which, candidates) if found), None)


class BuildLibraries(build_ext):
    """Compiles each library with one plain compiler call, or writes down why it could not."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python ABI in it, none in the name

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        skipped = library.with_suffix(".skipped")
        library.parent.mkdir(parents=True, exist_ok=True)
        for stale in (library, skipped):
            stale.unlink(missing_ok=True)
        reason = "no compiler was tried"
        build = self.cuda_commands if library.stem.endswith("_cuda") else self.cpu_commands
        try:
            for command in build([*ext.sources, "-o", str(library)]):
                reason = self.compile(command)
                if not reason:
                    return
        except FileNotFoundError as missing:
            reason = str(missing)
        library.unlink(missing_ok=True)
        skipped.write_text(reason + "\n", encoding="utf-8")
        print(f"warning: {library.name} was not built: {reason}. PyTorch does its work instead.")

    @staticmethod
    def cpu_commands(arguments: list[str]) -> list[list[str]]:
        compiler = find_command("CXX", "g++", "clang++")
        if compiler is None:
            raise FileNotFoundError("no C++ compiler (g++ or clang++) was found on the PATH")
        # a fused multiply-add would round other than the reference does
        plain = ["-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-exceptions"]
        command = [*compiler, *plain, "-fno-rtti", "-fvisibility=hidden", *WARNINGS]
        return [[*command, "-fopenmp", *arguments], [*command, *arguments]]

    @staticmethod
    def cuda_commands(arguments: list[str]) -> list[list[str]]:
        compiler = find_command("NVCC", "nvcc", "/usr/local/cuda/bin/nvcc")
        if compiler is None:
            raise FileNotFoundError("nvcc was not found on the PATH nor in /usr/local/cuda/bin")
        archs = os.environ.get("MV2V_CUDA_ARCHS", "80;90a;120").split(";")
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        host = ",".join(["-fPIC", "-fvisibility=hidden", *WARNINGS])
        plain = ["-O3", "-std=c++17", "-shared", "-cudart", "static", "--threads", "0"]
        return [[*compiler, *plain, "-Xcompiler", host, *targets, *arguments]]

    @staticmethod
    def compile(command: list[str]) -> str:
        """Empty if the command succeeded, else what it said."""
        print(shlex.join(command))
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        except OSError as error:
            return f"{command[0]} cannot be run: {error.strerror}"
        said = (done.stderr or done.stdout).strip()
        if said and not done.returncode:
            print(said)
        return "" if not done.returncode else f"{command[0]} failed: {said[-600:]}"

    def copy_extensions_to_source(self) -> None:
        """Editable installs: libraries and reasons beside the sources, without older ones."""
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            in_source, built = map(Path, self._get_inplace_equivalent(build_py, ext))
            for suffix in (".so", ".skipped"):
                in_source.with_suffix(suffix).unlink(missing_ok=True)
                if built.with_suffix(suffix).exists():
                    self.copy_file(
                        str(built.with_suffix(suffix)), str(in_source.with_suffix(suffix))
                    )

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def get_output_mapping(self) -> dict[str, str]:
        mapping = super().get_output_mapping()
        return {built: path for built, path in mapping.items() if os.path.exists(built)}


has_kernels = (ROOT / "kernels").is_dir()

setup(
    packages=find_packages(include=["mv2v_engine*"])
    + (find_packages("kernels") if has_kernels else []),
    package_dir={"mv2v_kernels": "kernels/mv2v_kernels"} if has_kernels else {},
    package_data={"mv2v_engine": ["assets/**", "serving/http/page/*", "py.typed"]},
    ext_modules=[
        Extension(
            "mv2v_engine.ops.libmv2v_cpu",
            sources("csrc/cpu", ".cpp"),
            depends=[*HEADERS, *sources("csrc/cpu", ".h")],
            optional=True,
        ),
        Extension(
            "mv2v_engine.ops.libmv2v_cuda",
            sources("csrc/cuda", ".cu"),
            depends=HEADERS,
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildLibraries},
)
