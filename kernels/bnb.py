"""bitsandbytes' functions, imported such that they reach for no hub.

On a CPU with AVX512-BF16 bitsandbytes (0.50.2, `backends/cpu/ops.py`) looks for a matmul of its own in the package
`kernels` while it is imported: where that is installed it is downloaded and run, where not a warning is printed that
asks to install it. Nothing here would use it: the CPU's matmuls are in `native/`.
"""

import logging
import sys

_ABSENT = "kernels"

_log = logging.getLogger("bitsandbytes.backends.cpu.ops")
_level = _log.level
_log.setLevel(logging.ERROR)
_found = sys.modules.get(_ABSENT)
sys.modules[_ABSENT] = None  # type: ignore[assignment]  # `import` says that it is not installed
try:
    from bitsandbytes import functional
finally:
    _log.setLevel(_level)
    if _found is None:
        del sys.modules[_ABSENT]
    else:
        sys.modules[_ABSENT] = _found

__all__ = ["functional"]
