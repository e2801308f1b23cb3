"""From a source, whichever kind it is, to a read and checked adapter. Runs on the manager's disk threads."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .core import ManagerCore
from .errors import AdapterMismatchError, AdapterNoVersionError
from .info import LoadOptions
from .reader import AdapterReader, LoadedAdapter
from .sources.fetch import Fetcher
from .sources.locate import LocalSource, RemoteSource, SourcePolicy
from .version import AdapterVersion


@dataclass(frozen=True, slots=True)
class StoredSource:
    """The files of a version that the version store keeps."""

    digest: str


Source = LocalSource | RemoteSource | StoredSource


class SourceReader:
    """Reads adapters from where they are. Thread-safe.

    Args:
        core: the version store, and what makes tokenizers.
        reader: reads and packs.
        sources: where adapters may come from.
        fetcher: brings remote ones here.
        settle_s: how long the files of a local folder must have been left alone; what was fetched or kept is whole.
    """

    def __init__(
        self, core: ManagerCore, reader: AdapterReader, sources: SourcePolicy, fetcher: Fetcher, *, settle_s: float
    ) -> None:
        self._core = core
        self._reader = reader
        self._sources = sources
        self._fetcher = fetcher
        self._settle_s = settle_s

    def close(self) -> None:
        """Break downloads off."""
        self._fetcher.close()

    def read(self, adapter_id: str, source: Source, options: LoadOptions) -> LoadedAdapter:
        """Fetch, read and check an adapter, with what the server makes of its tokenizer.

        Raises:
            AdapterNoVersionError: a version that is not kept any more.
            ServingError: as `AdapterReader.read`, and of remote sources as `Fetcher.fetch`.
        """
        settle_s = self._settle_s if isinstance(source, LocalSource) else 0.0
        with self._opened(source) as (directory, roots, name):
            loaded = self._reader.read(
                adapter_id, directory, roots=roots, options=options, name=name, settle_s=settle_s
            )
        if self._core.make_tokenizer is None:
            return loaded
        return loaded._replace(tokenizer=self._core.make_tokenizer(loaded.tokenizer_files, loaded.packed.vocab_size))

    def read_kept(self, version: AdapterVersion) -> LoadedAdapter:
        """Read a known version again, from the version store or, when it is not there, from its folder.

        Raises:
            AdapterNoVersionError: neither has this content any more.
            ServingError: as `AdapterReader.read`.
        """
        directory = self._core.state.store.get(version.digest)
        roots: Sequence[Path] = (self._core.state.path.resolve(),)
        if directory is None:
            roots = self._sources.roots
            with self._core.changed:
                directory = self._core.registry.records[version].origin.directory
        try:
            return self._reader.read(version.adapter_id, directory, roots=roots, options=trusting(version.digest))
        except AdapterMismatchError:
            raise AdapterNoVersionError(
                f"The files of version {version.digest[:12]} are not kept any more, and where they came from is other "
                "content by now; load what is there, or put them back."
            ) from None

    def find_kept(self, digest: str) -> Path:
        """Where the files of a version are in the version store.

        Raises:
            AdapterNoVersionError: it does not have them.
        """
        kept = self._core.state.store.get(digest)
        if kept is None:
            raise AdapterNoVersionError(
                f"The files of version {digest[:12]} are not kept any more (--adapter-store-bytes is their "
                "budget); load the adapter from where it is."
            )
        return kept

    @contextlib.contextmanager
    def _opened(self, source: Source) -> Iterator[tuple[Path, Sequence[Path], str]]:
        """A directory with the source's files, the roots that they must lie in, and what to call it."""
        if isinstance(source, LocalSource):
            yield source.directory, self._sources.roots, source.directory.name
        elif isinstance(source, RemoteSource):
            with self._fetcher.fetch(source) as directory:
                yield directory, (directory,), source.uri
        else:
            with self._core.storing(source.digest):  # else another load could take its room while it is read
                kept = self.find_kept(source.digest)
                yield kept, (kept,), f"version {source.digest[:12]}"


def trusting(digest: str) -> LoadOptions:
    """Options to read content again that was accepted before."""
    return LoadOptions(allow_zero=True, allow_other_base=True, expected_digest=digest)
