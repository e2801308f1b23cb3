"""benchmarks/registry_scale.py with a few adapters: the real script, and what it leaves behind."""

import json

from .scripts import run_script


def test_registry_scale_measures_every_call_for_every_number(tmp_path):
    text = run_script("registry_scale.py", "--quick", "--out", tmp_path)
    assert 0 < text.index("resolve + release / with 3") < text.index("snapshot, ms")
    result = json.loads((tmp_path / "registry_scale.json").read_text())
    for number in ("3", "20"):
        (values,) = zip(*result["rounds"][number].values(), strict=True)
        assert len(values) == 4 and all(value > 0 for value in values)
    assert (tmp_path / "registry_scale.png").stat().st_size > 5000
