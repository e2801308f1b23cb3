"""Builds the C++ kernels; all else is in pyproject.toml.

The same sources for three instruction sets, of which one is chosen at start (kernels/native/functions.py). They are
optional: without a compiler, or on a processor that has no such set, the package installs without them.
"""

import copy
import os
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

LIBRARIES = {
    "avx512": ["-march=x86-64-v4", "-mavx512bf16"],
    "avx2": ["-march=x86-64-v3"],
    "portable": ["-Wno-psabi"],
}


class BuildLibraries(build_ext):
    """As setuptools', with a folder of objects for each extension.

    With one folder for all, two that are compiled at a time would be linked from each other's objects: an AVX2 library
    with loops for any processor, or one that no processor without AVX-512 can run.
    """

    def build_extension(self, ext: Extension) -> None:
        """Called from several threads at a time."""
        own = copy.copy(self)
        own.build_temp = os.path.join(self.build_temp, ext.name)
        super(BuildLibraries, own).build_extension(ext)


setup(
    cmdclass={"build_ext": BuildLibraries},
    ext_modules=[
        Extension(
            f"lorikeet.kernels.native._{name}",
            sources=sorted(glob("kernels/native/*.cpp")),
            depends=sorted(glob("kernels/native/*.h")),
            language="c++",
            extra_compile_args=["-std=gnu++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", *flags],
            optional=True,
        )
        for name, flags in LIBRARIES.items()
    ],
)
