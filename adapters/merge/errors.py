"""Why a merge does not begin, or leaves nothing behind."""

import errno
from typing import Final

from ..errors import Code, ServingError

# A full disk, a quota, a limit on the size of files.
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class MergeError(ServingError):
    """What was asked for cannot be merged or written in that form; names the module, the setting or the file."""

    code = Code.FAILED_PRECONDITION
    reason = "MERGE_REFUSED"


class MergeLossError(MergeError):
    """The merged model gives up too much of what the fine-tune gained."""

    reason = "MERGE_LOSS"


class MergeOutputExistsError(ServingError):
    """There is something where the merged model would go. Nothing is overwritten."""

    code = Code.ALREADY_EXISTS
    reason = "MERGE_OUTPUT_EXISTS"


class MergeDiskError(ServingError):
    """The disk is full, or will be; nothing is left behind."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "MERGE_DISK"


class MergeUnwritableError(ServingError):
    """The place for the merged model cannot be written to."""

    code = Code.FAILED_PRECONDITION
    reason = "MERGE_UNWRITABLE"


class MergeCancelledError(ServingError):
    """The merge was cancelled; nothing is left behind."""

    code = Code.CANCELLED
    reason = "MERGE_CANCELLED"


def disk_error(error: OSError, name: str) -> ServingError:
    """The error for a write that the disk refused.

    Args:
        error: the operating system's.
        name: of the directory that is written.
    """
    if error.errno in _FULL:
        return MergeDiskError(
            f"The disk is full: {name} could not be written, and nothing is left of it. Free space, or choose a "
            "directory on another disk."
        )
    return MergeUnwritableError(
        f"{name} could not be written ({error.strerror or type(error).__name__}); nothing is left of it. Choose a "
        "directory that this user may write to."
    )
