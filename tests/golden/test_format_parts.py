"""The adapters that the comparisons with PEFT are made with: each one's special part changes what PEFT answers.

Otherwise a server that drops the part in silence would pass those comparisons.
"""

import shutil
from pathlib import Path

import pytest

from ..devices import CPU
from .conftest import World
from .format_oracle import random_prompts

# Leaving a part out must move a logit by at least so much: 500 times the tolerance of the comparisons.
MATTERS = 0.1

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's hints for training


def test_special_part_of_a_format_matters(world: World, tmp_path: Path) -> None:
    if world.device != CPU:
        pytest.skip("PEFT alone, which the CPU has shown")
    oracle = world.oracle
    (ids,) = random_prompts(1, (30, 31), oracle.vocab_size, seed=2)
    ids += [3, 4, 5, 7, 9, 100, 198]  # rows that trainable_token_indices name
    base = oracle.logits((), ids)
    for name, made in world.made.items():
        want = oracle.logits(((name, 1.0),), ids)
        assert (want[:, : oracle.vocab_size] - base).abs().max() > MATTERS, name
        if made.without is not None:
            directory = shutil.copytree(oracle.pristine / name, tmp_path / name)
            made.without.strip(directory)
            assert (want - oracle.logits_of(made, directory, ids)).abs().max() > MATTERS, name
