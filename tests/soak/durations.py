"""How long soaks take; see test_soak.py."""

import os
from typing import Final

TOTAL_S: Final = float(os.environ.get("LORIKEET_SOAK_SECONDS") or 40)
KILL_S: Final = TOTAL_S / 3
# The rest, less what making models, answers and servers takes.
IN_PROCESS_S: Final = max(TOTAL_S - KILL_S - 10, 12)
# Long enough for most sizes of steps, of which the engine keeps some tensors each.
WARM_UP_S: Final = max(IN_PROCESS_S / 4, 7.5)
