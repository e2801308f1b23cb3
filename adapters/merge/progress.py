"""How a merge tells how far it is, and how it is told to stop. Imports no torch."""

from collections.abc import Callable

from .errors import MergeCancelledError

# (what is being done, how much of it is done, how much there is); called on the merging thread, often.
Progress = Callable[[str, int, int], None]


class CancelCheck:
    """Asks whether a merge was cancelled, wherever its work can be left.

    Attributes:
        is_cancelled: may be set while the merge is planned and until it runs.
    """

    def __init__(self) -> None:
        self.is_cancelled: Callable[[], bool] = lambda: False

    def __call__(self) -> None:
        """Raise MergeCancelledError if the merge was cancelled."""
        if self.is_cancelled():
            raise MergeCancelledError("The merge was cancelled; nothing is left of it.")
