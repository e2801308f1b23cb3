"""A person at the watched folders: copies, replaces, truncates and removes, carefully and carelessly."""

import os
import time
from typing import Final

from lorikeet.adapters.info import AdapterState

from .actor import Actor
from .contents import WEIGHTS, Content, overwrite, place, remove, rename_over
from .world import World

# What the watcher and the loads that it starts may take to follow the folders, when nothing else goes on.
CONVERGE_S: Final = 30.0


class FolderKeeper(Actor):
    """See the module; requests for its ids may get any content, or none, but never a mixture.

    Args:
        world, name, seed, pause_s: see Actor.
        ids: folders that nobody else touches; what is in them may be touched by calls if `shared`.
        shared: those of them.
    """

    def __init__(self, world: World, name: str, seed: int, pause_s: float, ids: list[str], shared: list[str]) -> None:
        super().__init__(world, name, seed, pause_s)
        self._ids, self._shared = ids, shared
        self._whole: dict[str, Content | None] = dict.fromkeys(ids)  # what is there; None: nothing, or a torn folder
        self._half: tuple[str, Content] | None = None

    def forget(self) -> None:
        """Remove all folders."""
        self._half = None
        for adapter_id in self._ids:
            remove(self.world.root / adapter_id)
            self._whole[adapter_id] = None

    def act(self) -> None:
        """One operation."""
        if self._half is not None:
            self._finish_copy(*self._half)
            return
        adapter_id, content = self.rng.choice(self._ids), self.rng.choice(self.world.contents)
        operations = (
            ("folder placed", self._place, 10),
            ("folder overwritten", self._overwrite, 10),
            ("files renamed", self._rename_files, 5),
            ("folder truncated", self._truncate, 3),
            ("folder linked", self._link, 4),
            ("folder half copied", self._half_copy, 4),
            ("folder removed", self._remove, 5),
        )
        name, act, _ = self.rng.choices(operations, [weight for *_, weight in operations])[0]
        self.world.count(name)
        act(adapter_id, content)

    def _place(self, adapter_id: str, content: Content) -> None:
        place(content, self.world.root / adapter_id)
        self._whole[adapter_id] = content

    def _overwrite(self, adapter_id: str, content: Content) -> None:
        self._unlink(adapter_id)
        overwrite(content, self.world.root / adapter_id)
        self._whole[adapter_id] = content

    def _rename_files(self, adapter_id: str, content: Content) -> None:
        self._unlink(adapter_id)
        rename_over(content, self.world.root / adapter_id)
        self._whole[adapter_id] = content

    def _truncate(self, adapter_id: str, content: Content) -> None:
        self._overwrite(adapter_id, content)
        weights = self.world.root / adapter_id / WEIGHTS
        os.truncate(weights, self.rng.randrange(weights.stat().st_size))
        self._whole[adapter_id] = None

    def _link(self, adapter_id: str, content: Content) -> None:
        remove(self.world.root / adapter_id)
        (self.world.root / adapter_id).symlink_to(f".staged/{content.name}")
        self._whole[adapter_id] = content

    def _half_copy(self, adapter_id: str, content: Content) -> None:
        self._truncate(adapter_id, content)
        self._half = (adapter_id, content)

    def _finish_copy(self, adapter_id: str, content: Content) -> None:
        self._half = None
        self._overwrite(adapter_id, content)

    def _remove(self, adapter_id: str, _: Content) -> None:
        remove(self.world.root / adapter_id)
        self._whole[adapter_id] = None

    def _unlink(self, adapter_id: str) -> None:
        """Writing through the link would change what it leads to."""
        target = self.world.root / adapter_id
        if target.is_symlink():
            target.unlink()

    def check_followed(self) -> None:
        """With everybody else quiet, and no faults, the server comes to serve what is in the folders."""
        deadline = time.monotonic() + CONVERGE_S
        touched: set[str] = set()
        behind = self._behind()
        while behind:
            if time.monotonic() > deadline:
                infos = [info for info in self.world.app.manager.list() if info.adapter_id in behind]
                raise AssertionError(f"not followed within {CONVERGE_S} s: {behind}; there is {infos}")
            for adapter_id in behind:
                # One that was refused because of a fault is tried again when it changes.
                if self._has_failed(adapter_id) and adapter_id not in touched:
                    touched.add(adapter_id)
                    content = self._whole[adapter_id]
                    if content is not None:
                        self._place(adapter_id, content)
            time.sleep(0.02)
            behind = self._behind()

    def _behind(self) -> dict[str, str | None]:
        """Folders that are not served as they are: id -> digest there."""
        manager = self.world.app.manager
        served = {info.adapter_id: info.digest for info in manager.list() if info.current}
        wanted = {
            adapter_id: content.digest if content is not None else None
            for adapter_id, content in self._whole.items()
            if adapter_id not in self._shared
        }
        return {
            adapter_id: digest
            for adapter_id, digest in wanted.items()
            # A torn folder may keep what was served before.
            if (digest is not None and served.get(adapter_id) != digest)
            or (digest is None and not (self.world.root / adapter_id).exists() and adapter_id in served)
        }

    def _has_failed(self, adapter_id: str) -> bool:
        return any(
            info.adapter_id == adapter_id and (info.state is AdapterState.FAILED or info.error)
            for info in self.world.app.manager.list()
        )
