"""bitsandbytes is imported without looking for kernels of a hub."""

import os
import subprocess
import sys
from pathlib import Path


def test_no_package_of_a_hub_is_asked_or_asked_for(tmp_path: Path) -> None:
    # What is found would be imported, and download more; bitsandbytes looks where the CPU has AVX512-BF16.
    (tmp_path / "kernels.py").write_text("raise SystemExit('imported')")
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-c"),
            "import sys; from lorikeet.kernels.bnb import functional as f; print(f.__name__, 'kernels' in sys.modules)",
        ],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "bitsandbytes.functional False\n", "")
