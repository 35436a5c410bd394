"""The C kernels and the wheel's tag; everything else is in pyproject.toml.

KVCOMP_KERNELS, an environment variable, says what to do about the kernels:

    auto      compile them where there is a compiler; without one, install the Python code alone (the default)
    required  fail where they do not compile, as release builds must
    none      leave them out: a wheel for any platform, whose attention runs in PyTorch
"""

import os
from pathlib import Path
from runpy import run_path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, OptionError

OPENMP = ["-fopenmp"]  # linked by name, libgomp.so.1 is the one that torch has loaded by then
FOLDER = Path(__file__).parent / "kernels" / "cpu"
SOURCES = run_path(str(FOLDER / "sources.py"))["digest"](FOLDER)
COMPILE = ["-O3", "-g0", "-std=gnu99", "-Wno-psabi"]
KERNELS = os.environ.get("KVCOMP_KERNELS", "auto")
if KERNELS not in ("auto", "required", "none"):
    raise OptionError(f"KVCOMP_KERNELS={KERNELS}: expected auto, required or none")


class BuildKernels(build_ext):
    """Without OpenMP if need be. It is no Python module and includes no Python header: ctypes loads it."""

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            raise CompileError("the kernel is written for gcc and clang")
        try:
            super().build_extension(ext)
        except (CompileError, LinkError):
            if KERNELS == "required":  # a release has OpenMP
                raise
            ext.extra_compile_args, ext.extra_link_args = COMPILE, []
            super().build_extension(ext)


class Wheel(bdist_wheel):
    """One wheel a platform serves every Python 3: the kernels use nothing of Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return "py3", "none", platform


kernels = Extension(
    "kvcomp.kernels.cpu._attend",
    sources=sorted(f"kernels/cpu/{path.name}" for path in FOLDER.glob("*.c")),
    depends=sorted(f"kernels/cpu/{path.name}" for path in FOLDER.glob("*.h")),
    define_macros=[("KVCOMP_SOURCES", f'"{SOURCES}"')],
    extra_compile_args=COMPILE + OPENMP,
    extra_link_args=OPENMP,
    libraries=["m"],
    py_limited_api=True,
    optional=KERNELS == "auto",
)

setup(
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
    ext_modules=[] if KERNELS == "none" else [kernels],
)
