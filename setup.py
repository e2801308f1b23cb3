"""Builds the C++ kernels, each library with object files of its own; all else is in pyproject.toml.

The libraries have the same sources. With one folder for all objects, which is what setuptools gives them, two that are
compiled at a time would be linked from each other's: an AVX2 library with loops for any processor, or one that no
processor without AVX-512 can run.
"""

import copy
import os

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildLibraries(build_ext):
    """As setuptools', with a folder of objects for each extension."""

    def build_extension(self, ext: Extension) -> None:
        """Called from several threads at a time."""
        own = copy.copy(self)
        own.build_temp = os.path.join(self.build_temp, ext.name)
        super(BuildLibraries, own).build_extension(ext)


setup(cmdclass={"build_ext": BuildLibraries})
