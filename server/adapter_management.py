"""What the services use of the adapter manager."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ..adapters.info import AdapterDetails, AdapterInfo, AliasInfo, LoadOptions, LoadPlan, Tier
from ..adapters.version import AdapterVersion


class AdapterManagement(Protocol):
    """Adapters as operators see them; `AdapterManager` is the real one.

    Everything may block, may be called on any thread, and raises a ServingError when it cannot do what it says. What a
    call has changed is durable before it returns.
    """

    def load(self, adapter_id: str, source: str | Path | None, options: LoadOptions) -> AdapterInfo:
        """Read, check and publish an adapter.

        Args:
            adapter_id: what users name.
            source: a path inside an adapter directory, or a URI as a string; None: the folder of that name.
            options: what it may accept or insist on.
        """
        ...

    def plan_load(self, adapter_id: str, source: str | Path | None, options: LoadOptions) -> LoadPlan:
        """Read and check everything, change nothing, and say what a load would do."""
        ...

    def unload(self, adapter_id: str) -> None:
        """Make an adapter unknown to later requests."""
        ...

    def rollback(self, adapter_id: str, digest_prefix: str) -> AdapterInfo:
        """Make an earlier version current again; an empty prefix means the one before."""
        ...

    def prefetch(self, reference: str, tier: Tier, timeout_s: float | None) -> AdapterInfo:
        """Bring a version into a tier, and return when it is there; AdapterNotReadyError after `timeout_s` seconds."""
        ...

    def pin(self, adapter_id: str, tier: Tier, timeout_s: float | None) -> AdapterInfo:
        """Keep an adapter in a tier, and return when it is there; AdapterNotReadyError after `timeout_s` seconds."""
        ...

    def unpin(self, adapter_id: str) -> AdapterInfo:
        """Let an adapter be evicted again."""
        ...

    def set_alias(self, name: str, targets: Sequence[tuple[str, float]]) -> AliasInfo:
        """Create an alias, or move it.

        Args:
            name: what requests may name.
            targets: reference (`id` or `id@digest-prefix`) and weight of each version that it leads to.
        """
        ...

    def delete_alias(self, name: str) -> None:
        """Make an alias unknown to later requests."""
        ...

    def list_aliases(self) -> Sequence[AliasInfo]:
        """Describe all aliases."""
        ...

    def resolve(self, reference: str, routing_key: str = "") -> AdapterVersion:
        """Hold the version that a reference means; does not block, and needs one release."""
        ...

    def release(self, version: AdapterVersion) -> None:
        """Let go of a version that was held."""
        ...

    def copy_files(self, version: AdapterVersion, target: Path) -> None:
        """Put the files of a held version into a directory of their own, where they stay as they are."""
        ...

    def describe(self, reference: str) -> AdapterDetails:
        """Describe an adapter and all its versions."""
        ...

    def list(self) -> Sequence[AdapterInfo]:
        """Describe all adapters."""
        ...
