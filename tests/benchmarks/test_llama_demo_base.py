"""llama.cpp on the demo base's own GGUF file: adapters do there what they do in PEFT on the same weights."""

import importlib
import sys

import pytest
from lorikeet.server.base.demo import GGUF_NAME, MODEL_DIR_NAME
from lorikeet.server.config import ServerConfig
from transformers import AutoTokenizer

from .scripts import BENCHMARKS

pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed: pip install -c constraints.txt -e '.[peers]'"
)
pytest.importorskip("peft")
pytest.importorskip("gguf")
CACHE = ServerConfig().cache_dir
BASE, GGUF_FILE = CACHE / MODEL_DIR_NAME, CACHE / GGUF_NAME
pytestmark = pytest.mark.skipif(
    not (BASE.is_dir() and GGUF_FILE.is_file()),
    reason="needs the demo base and its GGUF file; `make bench` fetches both",
)


@pytest.fixture(scope="module")
def effect():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("effect")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_adapters_add_to_the_demo_base_what_they_add_in_peft(effect, tmp_path):
    prompts = [
        AutoTokenizer.from_pretrained(BASE)("The quick brown fox jumps over the lazy dog. In the beginning").input_ids
    ]
    found = effect.measure_effect(BASE, GGUF_FILE, tmp_path, prompts, rank=16, threads=1)
    assert found.same.low > 0.95, found
    assert found.others.high < 0.6, found
