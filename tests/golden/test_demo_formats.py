"""The demo base with adapters of several formats, alone, mixed and summed, answers as PEFT does."""

import os
from pathlib import Path

import pytest
from lorikeet.server.base.demo import MODEL_DIR_NAME
from lorikeet.server.config import default_cache_dir

from .format_oracle import FormatOracle, Members, random_prompts
from .format_requests import ask, check
from .formats import formats
from .in_process import serving

BASE = Path(os.environ.get("LORIKEET_CACHE_DIR") or default_cache_dir()) / MODEL_DIR_NAME
NAMES = ("one-linear", "rslora", "dora")
SUMS: tuple[Members, ...] = ((("one-linear", 0.6), ("rslora", -0.3)),)

pytestmark = [
    pytest.mark.skipif(not BASE.is_dir(), reason="no demo base in the cache; `make demo` prepares it"),
    pytest.mark.filterwarnings("ignore"),  # PEFT's hints for training
]


def test_formats_on_the_demo_base(tmp_path: Path, demo_cache: Path) -> None:
    oracle = FormatOracle(BASE, tmp_path / "adapters", tmp_path / "pristine", noise=0.1)
    for number, made in enumerate(each for each in formats("llama") if each.name in NAMES):
        oracle.make(made, seed=number)
    sizes = {"kv_cache_bytes": "64MiB", "adapter_device_bytes": "64MiB", "step_tokens": 32, "max_running": 16}
    wanted: list[Members] = [(), *(((name, 1.0),) for name in NAMES), *SUMS]
    with serving(BASE, tmp_path / "adapters", base_cache=demo_cache, **sizes) as app:
        for name in NAMES:
            app.manager.load(name, None)
        prompts = random_prompts(len(wanted), (5, 40), oracle.vocab_size, seed=5)
        calls = [
            ask(app, f"demo {number}", members, prompt, tokens=3)
            for number, (members, prompt) in enumerate(zip(wanted, prompts, strict=True))
        ]
        for call in calls:
            check(call, oracle)
