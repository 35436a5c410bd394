"""The C kernel, where there is a compiler for it; all else is in pyproject.toml."""

from pathlib import Path
from runpy import run_path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

OPENMP = ["-fopenmp"]  # linked by name, libgomp.so.1 is the one that torch has loaded by then
FOLDER = Path(__file__).parent / "kernels" / "cpu"
SOURCES = run_path(str(FOLDER / "sources.py"))["digest"](FOLDER)
COMPILE = ["-O3", "-g0", "-std=gnu99", "-Wno-psabi"]


class BuildKernels(build_ext):
    """Without OpenMP if need be. It is no Python module and includes no Python header: ctypes loads it."""

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            raise CompileError("the kernel is written for gcc and clang")
        try:
            super().build_extension(ext)
        except (CompileError, LinkError):
            ext.extra_compile_args, ext.extra_link_args = COMPILE, []
            super().build_extension(ext)


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "kvcomp.kernels.cpu._attend",
            sources=sorted(f"kernels/cpu/{path.name}" for path in FOLDER.glob("*.c")),
            depends=sorted(f"kernels/cpu/{path.name}" for path in FOLDER.glob("*.h")),
            define_macros=[("KVCOMP_SOURCES", f'"{SOURCES}"')],
            extra_compile_args=COMPILE + OPENMP,
            extra_link_args=OPENMP,
            libraries=["m"],
            py_limited_api=True,
            optional=True,
        )
    ],
)
