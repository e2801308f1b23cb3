"""The C++ kernels of the CPU path, as a shared library that is built when the package is installed.

`functions.py` finds the library and hands out its functions; everything else here is C++: one operator family a file,
each with the contract of the Python module of the same name one folder up.
"""
