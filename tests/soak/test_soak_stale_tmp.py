import shutil
import pytest
from lorikeet.adapters.state.version_store import VersionStore
from ..golden.in_process import serving
STORE_BYTES = 80 * 2**10

def test_version_aliased_just_before_a_put_stays(tiny_model, tmp_path, soak_contents, monkeypatch):
    old, new, other = soak_contents[:3]
    root = tmp_path / "adapters"
    shutil.copytree(soak_contents[0].directory.parent, root)
    with serving(tiny_model, root, state_dir=tmp_path / "state", adapter_store_bytes=STORE_BYTES) as app:
        manager = app.manager
        manager.load("x", old.directory.name)
        manager.load("x", new.directory.name)
        put, done = VersionStore.put, []

        def late_put(store, digest, *args, **kwargs):
            if digest == other.digest and not done:
                done.append(manager.set_alias("prod", [(f"x@{old.digest[:12]}", 1.0)]))
            return put(store, digest, *args, **kwargs)

        monkeypatch.setattr(VersionStore, "put", late_put)
        manager.load("y", other.directory.name)
        assert done and old.digest in manager._core.state.store.digests()
