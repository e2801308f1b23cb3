"""How long soaks take; see test_soak.py."""

import os
from typing import Final

TOTAL_S: Final = float(os.environ.get("LORIKEET_SOAK_SECONDS") or 60)
KILL_S: Final = TOTAL_S / 3
# The rest, less what making models, answers and servers takes.
IN_PROCESS_S: Final = max(TOTAL_S - KILL_S - 10, 8)
WARM_UP_S: Final = IN_PROCESS_S / 4
