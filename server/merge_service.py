"""MergeService: begins merges, which operations_service.py follows. Runs on the event loop's thread.

A call goes the way of all management calls: check the message, ask whether this client may, and only then look anything
up. What is merged is settled here: each adapter's version is found and its files are given names of their own, so that
neither an unload nor a replacement changes a merge that waits or runs.
"""

import asyncio
import contextlib
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
from google.longrunning import operations_pb2  # type: ignore[import-untyped]

from ..adapters.carried_text import CARRIED_FILE
from ..adapters.errors import AdapterIdError, ServingError
from ..adapters.fingerprint import BaseFingerprint
from ..adapters.merge.errors import MergeOutputExistsError, disk_error
from ..adapters.merge.staging import check_output, remove_all_leftovers
from ..adapters.version import AdapterVersion
from ..protos.v1 import merges_pb2 as pb
from ..protos.v1.merges_pb2_grpc import MergeServiceServicer
from .access import Access, OpenAccess, hidden
from .adapter_management import AdapterManagement
from .config import ServerConfig
from .convert_merge import (
    DEFAULT_ITERATIONS,
    AskedMember,
    check_calibration,
    check_merge,
    merge_members,
    merge_onto,
    merge_target,
    operation_message,
)
from .errors import MergeNotConfiguredError
from .field_errors import blaming
from .interceptors import Context, current_request_id
from .merge_command import CALIBRATION_FILE, MergeCommand
from .merge_operations import MergedVersion, MergeObserver, MergeOperation, MergeOperations, RunMerge
from .merge_process import MergeRunner
from .workers import Workers

# They link or copy the files of adapters.
_COPY_THREADS: Final = 2
# Packed in float32, an adapter takes up to four times the bytes of its files, which may have 8 bits a value.
_PACKED_SHARE: Final = 4


@dataclass(frozen=True, slots=True)
class MergePlace:
    """What merges of a server have in common.

    Attributes:
        config: the server's.
        base: of the server.
        scratch: directory for what waits to be merged; emptied when a server starts.
    """

    config: ServerConfig
    base: BaseFingerprint
    scratch: Path


class MergeService(MergeServiceServicer):
    """The RPC of MergeService.

    Args:
        manager: of the adapters.
        place: where and with what merges are made.
        observer: told of merges.
        access: decides what each client may do; None: everything.
        run: runs a merge; None: in a process of its own.

    Attributes:
        operations: all merges; for `OperationsService`.
    """

    def __init__(
        self,
        manager: AdapterManagement,
        place: MergePlace,
        observer: MergeObserver,
        access: Access | None = None,
        run: RunMerge | None = None,
    ) -> None:
        config = place.config
        self.operations = MergeOperations(run or MergeRunner(config), self._discard, config.merge_max_queued, observer)
        self._manager = manager
        self._place = place
        self._access = OpenAccess() if access is None else access
        self._copies = Workers("merge-copy", _COPY_THREADS)

    async def MergeAdapter(self, request: pb.MergeAdapterRequest, context: Context) -> operations_pb2.Operation:
        """Begin a merge."""
        members = merge_members(request)
        check_merge(request)
        for member in members:
            self._access.may_manage(member.name)
        out = self._out(request.output)
        self.operations.check_room(request.output)
        begun = asyncio.ensure_future(self._begin(request, members, out))
        try:
            operation = await asyncio.shield(begun)
        except asyncio.CancelledError:
            # Its client has gone; what a thread is copying goes when it is done.
            begun.add_done_callback(self._give_up)
            raise
        structlog.contextvars.bind_contextvars(operation=operation.name)
        return operation_message(operation)

    def clear_leftovers(self) -> None:
        """Remove what merges of a server that was killed left. Blocks."""
        if self._place.config.merge_dir is not None:
            with contextlib.suppress(OSError):
                remove_all_leftovers(self._place.config.merge_dir.resolve())

    def stop(self) -> None:
        """Begin nothing more, and end what runs."""
        self.operations.stop()

    async def close(self) -> None:
        """Stop, and wait until nothing runs."""
        self._copies.close()
        await self.operations.close()

    async def _begin(
        self, request: pb.MergeAdapterRequest, members: Sequence[AskedMember], out: Path
    ) -> MergeOperation:
        work = self._place.scratch / f"merge-{secrets.token_hex(8)}"
        held: list[AdapterVersion] = []
        try:
            for index, member in enumerate(members):
                with blaming(f"adapters[{index}].adapter_id"):
                    held.append(self._resolve(member))
            command = await self._copies.run(lambda: self._prepare(request, members, held, work, out))
            return self.operations.add(
                command,
                tuple(
                    MergedVersion(version.adapter_id, version.digest, member.weight)
                    for version, member in zip(held, members, strict=True)
                ),
                frozenset(name for m, v in zip(members, held, strict=True) for name in (m.name, v.adapter_id)),
                current_request_id.get(),
            )
        except BaseException:
            _remove(work)
            raise
        finally:
            for version in held:
                self._manager.release(version)

    def _give_up(self, begun: "asyncio.Future[MergeOperation]") -> None:
        if not begun.cancelled() and begun.exception() is None:
            self.operations.cancel(begun.result())

    def _out(self, name: str) -> Path:
        directory = self._place.config.merge_dir
        if directory is None:
            raise MergeNotConfiguredError(
                "This server merges nothing: it was not told where merged models go. Start it with --merge-dir DIR."
            )
        out = directory.resolve() / name
        try:
            check_output(out)
        except MergeOutputExistsError:
            raise MergeOutputExistsError(
                f"{name} is there already, and nothing is overwritten; give another output.", {"field": "output"}
            ) from None
        return out

    def _resolve(self, member: AskedMember) -> AdapterVersion:
        """Hold the version that is meant."""
        if any(alias.name == member.name and len(alias.targets) > 1 for alias in self._manager.list_aliases()):
            raise AdapterIdError(
                f"Alias {member.name!r} leads to several versions; name the one that is meant (ListAliases has them).",
                {"alias": member.name},
            )
        version = self._manager.resolve(member.reference)
        try:
            if version.adapter_id != member.name:
                # An alias, whose target another client may manage.
                if not self._access.may_see(version.adapter_id):
                    raise hidden(member.name)
                self._access.may_manage(version.adapter_id)
        except ServingError:
            self._manager.release(version)
            raise
        return version

    def _prepare(
        self,
        request: pb.MergeAdapterRequest,
        members: Sequence[AskedMember],
        versions: Sequence[AdapterVersion],
        work: Path,
        out: Path,
    ) -> MergeCommand:
        """Bring everything that a merge needs into a directory of its own; on a thread."""
        # Each in a folder of its own: two versions of an adapter have the same name.
        directories = tuple(work / str(index) / version.adapter_id for index, version in enumerate(versions))
        try:
            for version, directory in zip(versions, directories, strict=True):
                self._manager.copy_files(version, directory)
            check_calibration(request, any((directory / CARRIED_FILE).exists() for directory in directories))
            if request.calibration:
                (work / CALIBRATION_FILE).write_text(request.calibration, encoding="utf-8")
            size = sum(path.stat().st_size for directory in directories for path in directory.iterdir())
            config = self._place.config
            command = MergeCommand(
                work=work,
                model=config.model,
                base_sha256=self._place.base.sha256,
                base_names=config.base_names,
                adapters=directories,
                weights=tuple(member.weight for member in members),
                onto=merge_onto(request),
                to=merge_target(request),
                out=out,
                has_calibration=bool(request.calibration),
                iterations=request.iterations or DEFAULT_ITERATIONS,
                texts=tuple(text for text in request.texts if text.strip()),
                accept_loss=request.accept_loss,
                allow_other_base=request.allow_other_base or config.adapter_allow_other_base,
                adapter_bytes=_PACKED_SHARE * size,
                threads=config.merge_threads,
                priority=config.merge_priority,
            )
            command.write()
        except OSError as error:
            shutil.rmtree(work, ignore_errors=True)
            raise disk_error(error, "The copy of the adapters") from error
        return command

    def _discard(self, command: MergeCommand) -> None:
        _remove(command.work)


def _remove(work: Path) -> None:
    """Remove a directory on another thread."""
    asyncio.get_running_loop().run_in_executor(None, lambda: shutil.rmtree(work, ignore_errors=True))
