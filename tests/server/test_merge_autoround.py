"""4-bit targets that are calibrated: where their text comes from, and the process that makes them."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from lorikeet.adapters.merge.errors import MergeCancelledError, MergeError
from lorikeet.adapters.merge.progress import CancelCheck
from lorikeet.adapters.merge.targets import Target
from lorikeet.server import merge_autoround
from lorikeet.server.errors import ConfigError
from lorikeet.server.merge_autoround import SAMPLE_TOKENS, Calibration, quantize
from lorikeet.server.merge_plan import MergePlan, MergeRequest, plan_merge
from safetensors.torch import load_file, save_file

from ..tiny import TEXT, save_tiny_adapter, save_tiny_model

LONG = "\n".join(TEXT * 80)
BAR = "Quantizing model.layers.{n}:  13%|█▎        | {n}/30 [01:00<09:00, 39.94s/it]"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "model"
    save_tiny_model(directory)
    return directory


@pytest.fixture
def saved(model: Path, tmp_path: Path) -> list[Path]:
    for seed, name in enumerate(("one", "two")):
        save_tiny_adapter(model, tmp_path / name, seed=seed, rank=2)
    return [tmp_path / "one", tmp_path / "two"]


@pytest.fixture
def adapters(saved: list[Path], monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two, in an environment that is said to have auto-round, whether it has or not."""
    monkeypatch.setattr(merge_autoround.importlib.util, "find_spec", lambda name: object())
    return saved


def planned(model: Path, adapters: list[Path], to: Target, calibration: Path | None = None) -> MergePlan:
    out = adapters[0].parent / "out"
    return plan_merge(MergeRequest(str(model), tuple(adapters), to, out, calibration=calibration))


def test_the_text_that_adapters_carry_is_taken_unless_another_is_given(
    model: Path, adapters: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"--calibration, .* or put it into the adapter's folder as calibration\.txt"):
        planned(model, adapters, Target.AWQ)
    carried = adapters[1] / "calibration.txt"
    carried.write_text(LONG)
    plan = planned(model, adapters, Target.AWQ)
    assert plan.calibration is not None and plan.calibration.files == (carried,)
    assert plan.calibration.tokens.shape == (32, SAMPLE_TOKENS)
    (adapters[0] / "calibration.txt").write_text(LONG)
    both = planned(model, adapters, Target.GPTQ).calibration
    assert both is not None and len(both.files) == 2 and len(both.tokens) > 32
    given = tmp_path / "given.txt"
    given.write_text(LONG)
    plan = planned(model, adapters, Target.AUTOROUND, given)
    assert plan.calibration is not None and plan.calibration.files == (given,)
    assert planned(model, adapters, Target.BF16).calibration is None


def test_a_text_that_is_too_short_or_cannot_be_read_is_named(model: Path, adapters: list[Path]) -> None:
    carried = adapters[0] / "calibration.txt"
    carried.write_text("Short.")
    with pytest.raises(ConfigError, match=r"one/calibration\.txt is too short: .* at least 2048 are needed"):
        planned(model, adapters[:1], Target.AUTOROUND)
    carried.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match=r"calibration\.txt is not UTF-8"):
        planned(model, adapters[:1], Target.AUTOROUND)


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    (tmp_path / "staging").mkdir()
    return tmp_path / "staging"


def run(staging: Path, script: str, monkeypatch: pytest.MonkeyPatch, check: CancelCheck) -> list[tuple[str, int, int]]:
    """Quantize with a shell script in place of the process; what it was told of is returned.

    For each number of blocks that was told, a file `told-N` comes into the parent of `staging`.
    """
    fake = staging.parent / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o700)
    monkeypatch.setattr(merge_autoround.sys, "executable", str(fake))
    seen: list[tuple[str, int, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        seen.append((what, done, total))
        (staging.parent / f"told-{done}").touch()

    calibration = Calibration((), torch.zeros(1, 1, dtype=torch.int64))
    quantize(
        staging, staging / "out", Target.AWQ, calibration, iterations=1, blocks=30,
        progress=progress, check=check,
    )  # fmt: skip
    return seen


def test_it_works_beside_its_output_and_leaves_nothing_there(
    staging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"echo layers > $AR_WORK_SPACE/offloaded; echo $AR_WORK_SPACE > {tmp_path}/seen"
    run(staging, script, monkeypatch, CancelCheck())
    seen = Path((tmp_path / "seen").read_text().strip())
    assert seen.parent == staging and [path.name for path in staging.iterdir()] == ["out"]


def test_its_bar_is_ours(staging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = "\\r".join(BAR.format(n=n) for n in range(3))
    last = BAR.format(n=30)
    # Neither comes before what was before it has been told.
    until = f"while [ ! -e {tmp_path}/told-%d ]; do sleep 0.02; done"
    script = f"{until % 0}; printf %b '{bars}'; {until % 2}; printf %s '{last}'; {until % 30}"
    told = run(staging, script, monkeypatch, CancelCheck())
    assert [(what, total) for what, _, total in told] == [("Quantizing (awq)", 30)] * len(told)
    done = [done for _, done, _ in told]
    assert done == sorted(set(done)) and 2 in done and done[-1] == 30


def test_what_it_says_when_it_fails_is_passed_on(staging: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MergeError, match="It said: second third fourth"):
        run(staging, "printf 'first\\nsecond\\n\\nthird\\nfourth\\n'; exit 1", monkeypatch, CancelCheck())


def test_a_cancelled_one_ends_at_once_and_leaves_nothing_beside_its_output(
    staging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = CancelCheck()
    number = tmp_path / "number"
    check.is_cancelled = number.exists
    with pytest.raises(MergeCancelledError):  # an hour: longer than a test may take
        run(staging, f"echo $$ > {tmp_path}/n; mv {tmp_path}/n {number}; exec sleep 3600", monkeypatch, check)
    with pytest.raises(ProcessLookupError):
        os.kill(int(number.read_text()), 0)
    assert [path.name for path in staging.iterdir()] == ["out"]


def test_it_ends_when_who_started_it_was_killed(tmp_path: Path) -> None:
    (tmp_path / "auto_round.py").write_text("import time; time.sleep(100)")
    with tempfile.TemporaryFile() as given:
        given.write(b"{}")
        given.seek(0)
        done = subprocess.run(
            [sys.executable, "-P", "-m", merge_autoround.__name__, str(given.fileno())],
            pass_fds=[given.fileno()], stdin=subprocess.DEVNULL, capture_output=True, timeout=90,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(("named", "dtype"), [("float16", torch.float16), ("float32", torch.bfloat16)])
def test_what_is_not_quantized_is_stored_in_16_bit(named: str, dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(6, 4).bfloat16()
    packed = torch.randint(-(2**31), 2**31 - 1, (3, 5), dtype=torch.int32)
    save_file({"embedding": values.float(), "norm": values[0].clone()}, tmp_path / "model-1.safetensors")
    save_file({"qweight": packed, "scales": values.half()}, tmp_path / "model-2.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"dtype": named, "bits": 4}))
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": {}})
    )
    merge_autoround.round_dense(tmp_path)
    dense, quantized = (load_file(tmp_path / f"model-{n}.safetensors") for n in (1, 2))
    assert dense["embedding"].dtype == dtype and dense["norm"].dtype == torch.bfloat16
    torch.testing.assert_close(dense["embedding"].float(), values.float(), atol=1e-7, rtol=0)
    assert torch.equal(quantized["qweight"], packed) and torch.equal(quantized["scales"], values.half())
    assert json.loads((tmp_path / "config.json").read_text()) == {"dtype": str(dtype)[6:], "bits": 4}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 24 * 2 + 4 * 2 + 15 * 4 + 24 * 2
