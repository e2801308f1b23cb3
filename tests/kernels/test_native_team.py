"""The threads that the C++ kernels share work among: whoever calls, however many at a time, gets the same result."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from lorikeet.kernels.linear import linear
from lorikeet.kernels.native import functions

needs_library = pytest.mark.skipif(functions.library_name() is None, reason="no compiled kernels")


@pytest.fixture
def five_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    yield
    torch.set_num_threads(before)


@needs_library
def test_many_callers_at_once_get_what_one_gets(five_threads):
    weight = torch.randn(3001, 64)
    inputs = [torch.randn(rows, 64) for rows in (1, 2, 5, 33, 70, 7)]
    torch.set_num_threads(1)
    want = [linear(x, weight) for x in inputs]
    wrong = []

    def call(index):
        torch.set_num_threads(5)
        for _ in range(60):
            if not torch.equal(linear(inputs[index], weight), want[index]):
                wrong.append(index)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not any(caller.is_alive() for caller in callers) and wrong == []


@needs_library
def test_a_forked_process_has_no_helpers_and_computes_all_the_same():
    program = (
        "import os, torch; from lorikeet.kernels.linear import linear; torch.set_num_threads(3)\n"
        "x, w = torch.randn(40, 64), torch.randn(2000, 64); want = linear(x, w); pid = os.fork()\n"
        "same = torch.equal(linear(x, w), want)\n"
        "os._exit(0 if same else 1) if pid == 0 else None\n"
        "raise SystemExit(os.waitpid(pid, 0)[1] or not same)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", program], timeout=60).returncode == 0


@pytest.mark.parametrize(("choice", "said"), [("avx1024", "it can be avx512, avx2, portable or off"), ("off", "None")])
def test_the_library_can_be_chosen(choice, said):
    program = "from lorikeet.kernels.native.functions import library_name; print(library_name())"
    environment = os.environ | {"LORIKEET_NATIVE_KERNELS": choice}
    done = subprocess.run([sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True)
    assert said in done.stdout + done.stderr


def test_a_library_that_this_cpu_cannot_run_is_refused(monkeypatch):
    monkeypatch.setenv("LORIKEET_NATIVE_KERNELS", "avx512")
    monkeypatch.setattr(functions, "_cpu_flags", lambda: frozenset({"avx2", "avx512f", "avx512bw"}))
    functions._library_path.cache_clear()
    with pytest.raises(ValueError, match="this CPU lacks avx512cd, avx512dq, avx512vl, avx512_bf16; unset it"):
        functions.library_name()
    functions._library_path.cache_clear()


@needs_library
def test_a_library_of_other_sources_is_refused(monkeypatch):
    monkeypatch.setattr(functions, "_INTERFACE", -1)
    functions._load.cache_clear()
    with pytest.raises(ImportError, match="install Lorikeet again"):
        functions.function("lorikeet_linear")
    functions._load.cache_clear()
