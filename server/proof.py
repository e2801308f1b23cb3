"""Replays an adapter's golden file on the engine that will serve it, and refuses the adapter if its logits are off.

Called by the adapter manager on a loader thread, for a version that no request can name yet. The prompts run as greedy
requests of one token each, through the same queue, scheduler, KV cache and kernels as everybody's, so what is compared
is what clients would get. Metrics do not count them, and their ids (`golden/...`) cannot be a client's: those end with
`#` and a number.
"""

import itertools
import queue
import time
from collections.abc import Callable
from typing import Final, Protocol

import structlog
import torch
from torch import Tensor

from ..adapters.adaptation import Adaptation
from ..adapters.errors import AdapterInvalidError, AdapterNotReadyError, AdapterProofError, ServingError
from ..adapters.golden import GOLDEN_FILE, Golden, wrong_vocabulary
from ..adapters.golden_comparison import compare
from ..adapters.version import AdapterVersion
from .engine.errors import NonFiniteLogitsError
from .engine.request import Delta, Event, Failed, Request
from .engine.sampling_params import SamplingParams
from .errors import PromptTooLongError

_ONE_TOKEN: Final = SamplingParams(temperature=0.0, max_tokens=1)

_log = structlog.stdlib.get_logger(__name__)


class EngineClient(Protocol):
    """What is used of the engine; both may be called on any thread and return at once."""

    def submit(self, request: Request) -> None:
        """Hand a request over. Raises a ServingError when it is not accepted."""
        ...

    def abort(self, request_id: str) -> None:
        """End a request; nothing happens if it has ended."""
        ...


class GoldenProver:
    """The `prover` of the adapter manager. Any thread but the step thread; calls may overlap.

    Args:
        engine: computes.
        hold: takes one more pin of a version that the caller holds; the engine gives back one for each request.
        release: gives one back for a request that the engine did not accept.
        timeout_s: longest time that the prompts of a file may take, the adapter's way to the device included.
        vocab_size: of the base; its embedding has no rows for other tokens.
        exact: whether the engine computes in float32, so that hardly any difference is accepted.
    """

    def __init__(
        self,
        engine: EngineClient,
        hold: Callable[[AdapterVersion], None],
        release: Callable[[AdapterVersion], None],
        timeout_s: float,
        *,
        vocab_size: int,
        exact: bool,
    ) -> None:
        self._engine = engine
        self._hold = hold
        self._release = release
        self._timeout_s = timeout_s
        self._vocab_size = vocab_size
        self._exact = exact
        self._numbers = itertools.count()

    def __call__(self, version: AdapterVersion, golden: Golden, vocab_size: int | None = None) -> str:
        """Replay a golden file.

        Args:
            version: held by the caller until this returns.
            golden: its golden file.
            vocab_size: token ids that the adapter knows are below it; None: as many as the base has.

        Returns:
            What was proven, for people.

        Raises:
            AdapterProofError: the logits are off.
            AdapterInvalidError: the file is for a base of another vocabulary, or a prompt exceeds the context.
            AdapterNotReadyError: the engine did not get to it in time.
            ServingError: the engine is full or shutting down, or the adapter failed on its way to the device.
        """
        if vocab_size is None:
            vocab_size = self._vocab_size
        if golden.vocab_size != vocab_size:
            raise wrong_vocabulary(golden, vocab_size)
        comparison = compare(golden, self._replay(version, golden), exact=self._exact)
        _log.info("adapter_proof", adapter=version.adapter_id, digest=version.digest, result=str(comparison))
        if not comparison.ok:
            made_on = f" on {golden.base_model}" if golden.base_model else ""
            raise AdapterProofError(
                f"Adapter {version} does not answer as its golden file says ({comparison}; in nats, of the likeliest "
                f"tokens' log probabilities). The file was made{made_on} by {golden.made_by or 'unknown software'}. If "
                "base and adapter are the right ones, write it again with `lorikeet adapters golden`; to serve the "
                "adapter without proof, remove the file.",
                {"difference": f"{comparison.largest:.4g}", "tolerance": f"{comparison.tolerance:g}"},
            )
        return f"golden file: {comparison}"

    def _replay(self, version: AdapterVersion, golden: Golden) -> Tensor:
        """The engine's logits for the golden prompts: float32 [P, V]."""
        rows: dict[int, Tensor] = {}
        events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        deadline = time.monotonic() + self._timeout_s
        running: dict[int, str] = {}
        try:
            for index, prompt in enumerate(golden.prompts):
                running[index] = self._submit(version, prompt, index, rows, events)
            while running:
                index, event = _next(events, deadline, version)
                if isinstance(event, Delta):
                    continue
                del running[index]
                if isinstance(event, Failed):
                    raise _cause(event.error, version)
        finally:
            for request_id in running.values():
                self._engine.abort(request_id)
        if len(rows) < len(golden.prompts):  # a copy to the host failed; the log has the details
            raise ServingError(f"The golden file of adapter {version} could not be compared.")
        return torch.stack([rows[index] for index in range(len(rows))])

    def _submit(
        self,
        version: AdapterVersion,
        prompt: tuple[int, ...],
        index: int,
        rows: dict[int, Tensor],
        events: "queue.SimpleQueue[tuple[int, Event]]",
    ) -> str:
        """Hand one prompt to the engine; returns the request's id."""
        request = Request(
            request_id=f"golden/{version}/{next(self._numbers)}",
            prompt_token_ids=list(prompt),
            params=_ONE_TOKEN,
            adapter=Adaptation.single(version),
            emit=lambda event: events.put((index, event)),
            capture=lambda row: rows.__setitem__(index, row),
        )
        self._hold(version)
        try:
            self._engine.submit(request)
        except BaseException as error:
            self._release(version)
            if isinstance(error, PromptTooLongError):
                raise AdapterInvalidError(
                    f"{GOLDEN_FILE} cannot be replayed here. {error.message}", {"file": GOLDEN_FILE}
                ) from None
            raise
        return request.request_id


def _next(
    events: "queue.SimpleQueue[tuple[int, Event]]", deadline: float, version: AdapterVersion
) -> tuple[int, Event]:
    try:
        return events.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        raise AdapterNotReadyError(
            f"The golden file of adapter {version} was not computed in time: the engine is busy. Try again later."
        ) from None


def _cause(error: ServingError, version: AdapterVersion) -> ServingError:
    if isinstance(error, NonFiniteLogitsError):
        return AdapterProofError(f"Adapter {version} computes logits that are not finite for its golden file.")
    return error
