"""A server imports no compiler, and leaves torch as it was."""

import subprocess
import sys

import pytest
import torch
from lorikeet.server.lean_imports import lean_imports


def test_compile_is_passive_for_a_while_only():
    compile_ = torch.compile
    with lean_imports():

        @torch.compile
        def plain(x):
            return x

        @torch.compile(dynamic=False)
        def given(x):
            return x + 1

    assert torch.compile is compile_
    assert (plain(1), given(1)) == (1, 2)
    with pytest.raises(KeyError), lean_imports():
        raise KeyError
    assert torch.compile is compile_


def test_bitsandbytes_then_loads_no_inductor():
    program = (
        "import sys\nfrom lorikeet.server.lean_imports import lean_imports\n"
        "with lean_imports():\n    import bitsandbytes.functional\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
