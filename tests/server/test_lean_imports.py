"""A server imports no compiler and no distributed tensors, and leaves torch and transformers as they were."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from lorikeet.server.lean_imports import lean_imports
from transformers.utils import import_utils

PROGRAM = """
import sys
import torch
from lorikeet.server.lean_imports import lean_imports

HEAVY = {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy", "accelerate"}
if not torch.cuda.is_available():
    HEAVY.add("triton")
with lean_imports():
    from lorikeet.server import app, lifecycle
    from lorikeet.server.base.loader import empty_model
    from transformers import LlamaConfig

    model = empty_model(LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1), torch.bfloat16)
assert not HEAVY & sys.modules.keys(), HEAVY & sys.modules.keys()
assert torch.distributed.is_available()
import accelerate

with lean_imports():
    compiler = sys.modules["torch._dynamo"]
    assert torch.compiler.disable(len) is len
    assert torch._dynamo is compiler
    optimize = torch._dynamo.optimize  # not one of the decorators
    assert sys.modules["torch._dynamo"] is not compiler
    assert sys.modules["accelerate"] is accelerate
assert torch._dynamo is sys.modules["torch._dynamo"] and torch._dynamo.optimize is optimize
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]
with lean_imports():
    assert torch._dynamo.optimize is optimize
"""


SERVE = """
import sys
from lorikeet.server.cli import run

assert run(["serve", "--port", "70000"]) == 2
assert not {"torch", "transformers", "rich"} & sys.modules.keys()
assert "structlog" in sys.modules
"""


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


def test_what_a_server_imports_and_what_works_afterwards():
    done = subprocess.run([sys.executable, "-P", "-c", PROGRAM], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_serve_starts_without_what_only_colours_tracebacks():
    done = subprocess.run([sys.executable, "-P", "-c", SERVE], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_quick_scan_of_the_models_finds_what_transformers_finds():
    program = (
        "import sys\nfrom lorikeet.server.lean_imports import lean_imports\n"
        "with lean_imports():\n    import transformers\n    from transformers.utils import import_utils\n"
        "assert import_utils.fetch__all__.__module__ == 'lorikeet.server.lean_imports'\n"
        "models = transformers.__path__[0] + '/models'\n"
        "got = [import_utils.define_import_structure(models), import_utils.define_import_structure(models + '/')]\n"
        "assert import_utils.create_import_structure_from_path.cache_info().hits > 400\n"
        "print(repr(sorted((sorted(k), sorted((n, sorted(v)) for n, v in x.items())) for k, x in got[1].items())))\n"
        "assert got[0] == got[1]"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    want = import_utils.define_import_structure(str(Path(transformers.__file__).parent / "models"))
    assert done.stdout.strip() == repr(
        sorted((sorted(k), sorted((n, sorted(v)) for n, v in x.items())) for k, x in want.items())
    )
