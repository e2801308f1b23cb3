"""The serving engine in this process, without gRPC: a base in NF4 and adapters unmerged on it, to be evaluated.

The parts are those that `lorikeet serve` assembles, and texts are scored by the same requests as a client's.
"""

import itertools
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Final

import torch
from pydantic import ByteSize
from torch import Tensor

from ...adapters.adaptation import Adaptation
from ...adapters.composition import Wish
from ...adapters.errors import AdapterIdError
from ...adapters.reference import parse_reference
from ..app import App, assemble
from ..base.demo import BASE_NAME, DEMO, prepare_demo_base
from ..base.loader import load_base
from ..config import ServerConfig
from ..engine.request import Delta, Event, Failed, Finished, Request
from ..engine.sampling_params import SamplingParams
from ..engine.scored_text import ScoredText
from ..policy.holder import PolicyHolder
from ..resolve import resolve_compute
from .errors import EvaluationError

# The KV cache has room for so many tokens, or one context if that is more.
_KV_TOKENS: Final = 8192
# What answers: adapter folders and what their effect is multiplied by; none is the base.
Members = Sequence[tuple[Path, float]]
BASE: Final[Members] = ()


class LocalEngine:
    """An engine that runs; see `local_engine`. Every method may be called on any thread.

    Args:
        app: assembled and started.
        references: of each adapter folder that was loaded.
    """

    def __init__(self, app: App, references: Mapping[Path, str]) -> None:
        self._app = app
        self._references = references
        self._numbers = itertools.count()

    @property
    def max_context(self) -> int:
        """Most tokens of a text."""
        return self._app.max_context

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._app.base.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of activations and adapters."""
        return self._app.base.compute_dtype

    @property
    def base_bytes(self) -> int:
        """Bytes of the base's weights, those that are not in NF4 in 16 bit, also where they are held in float32."""
        base = self._app.base  # counted by elements: on a CPU the vocabulary is in 16 bit whatever the compute type is
        return base.nf4_bytes + base.dense_elements * torch.bfloat16.itemsize

    @property
    def vocab_size(self) -> int:
        """Token ids that the base knows are below it."""
        return self._app.base.vocab_size

    def digest(self, directory: Path) -> str:
        """Of the version that was loaded from a folder."""
        return self._app.manager.get(self._references[directory]).digest

    def adapter_bytes(self, directory: Path) -> int:
        """Bytes of an adapter's packed weights in 16 bit."""
        size = self._app.manager.get(self._references[directory]).bytes
        return size * torch.bfloat16.itemsize // self.compute_dtype.itemsize

    def encode(self, text: str, members: Members = BASE) -> list[int]:
        """Token ids of a text, as the server reads it for these adapters.

        Raises:
            EvaluationError: one of them brought a tokenizer of its own.
        """
        adaptation = self._resolve(members)
        if adaptation is not None:
            try:
                if self._app.composition.vocabulary(adaptation).tokenizer is not None:
                    raise EvaluationError(
                        "The adapter brings a tokenizer of its own, which is run in a server only. Start one with "
                        "`lorikeet serve` and name it with --address.",
                        {"field": "adapter"},
                    )
            finally:
                self._app.composition.release(adaptation)
        return list(self._app.base.tokenizer.encode(text))

    def score(self, token_ids: Sequence[int], first: int, members: Members = BASE) -> list[float]:
        """Log probabilities of the tokens from `first` on.

        Raises:
            ServingError: the request was refused, or failed.
        """
        deltas = self._run(ScoredText(list(token_ids), first), members)
        return [score.logprob for delta in deltas for score in delta.logprobs]

    def logits(self, token_ids: Sequence[int], first: int, members: Members = BASE) -> Tensor:
        """Logits that predict the tokens from `first` on: float32 [len(token_ids) - first, vocab] on the device.

        Raises:
            ServingError: the request was refused, or failed.
        """
        pieces: dict[int, Tensor] = {}

        def keep(index: int, rows: Tensor) -> None:
            pieces[index] = rows.clone()

        self._run(ScoredText(list(token_ids), first, on_logits=keep), members)
        return torch.cat([pieces[index] for index in sorted(pieces)])

    def decode_step_s(self, prompt: Sequence[int], steps: int, members: Members = BASE) -> float:
        """Median seconds of a greedy decode step of one request, of `steps` after the prompt."""
        times: list[float] = []
        params = SamplingParams(temperature=0.0, max_tokens=steps + 1, ignore_eos=True)
        self._submit(list(prompt), params, None, members, lambda event: times.append(time.perf_counter()))
        return median(after - before for before, after in itertools.pairwise(times[: steps + 1]))

    def _run(self, text: ScoredText, members: Members) -> list[Delta]:
        return self._submit(text.prompt_token_ids, SamplingParams(), text, members, lambda event: None)

    def _submit(
        self,
        prompt: list[int],
        params: SamplingParams,
        text: ScoredText | None,
        members: Members,
        on_event: Callable[[Event], None],
    ) -> list[Delta]:
        """Run a request to its end."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()

        def emit(event: Event) -> None:
            on_event(event)
            events.put(event)

        adaptation = self._resolve(members)
        request = Request(f"evaluation/{next(self._numbers)}", prompt, params, adaptation, emit, scored=text)
        try:
            self._check_ids(prompt if text is None else text.token_ids, adaptation)
            self._app.engine.submit(request)
        except BaseException:
            if adaptation is not None:
                self._app.composition.release(adaptation)
            raise
        deltas: list[Delta] = []
        while True:
            event = events.get()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                return deltas
            deltas.append(event)

    def _check_ids(self, token_ids: Sequence[int], adaptation: Adaptation | None) -> None:
        """Raise EvaluationError for ids beyond the vocabulary: they would end the engine, not the request."""
        size = self._app.composition.vocabulary(adaptation).size or self.vocab_size
        largest = max(token_ids)
        if largest >= size:
            who = "the base" if adaptation is None else "the adapter"
            raise EvaluationError(
                f"The text has the token {largest}, and those that {who} knows are below {size}: evaluate it with an "
                "adapter that knows the token, or give text without it.",
                {"field": "text"},
            )

    def _resolve(self, members: Members) -> Adaptation | None:
        wishes = [Wish(self._references[directory], weight, "adapter") for directory, weight in members]
        return self._app.composition.resolve(wishes) if wishes else None


@contextmanager
def local_engine(
    config: ServerConfig, directories: Sequence[Path], *, context: int = 0, progress: bool = False
) -> Iterator[LocalEngine]:
    """Load a base and adapters, and run an engine on them until the block ends.

    Args:
        config: which base, where it runs, and how much memory it may take; its adapter directories are not looked at.
        directories: the adapters', each may be given more than once.
        context: tokens of the longest text that will be scored.
        progress: show bars on standard error.

    Raises:
        ConfigError, BaseModelError: the base.
        ServingError: an adapter; `AdapterManager.load` has the list.
        EvaluationError: a directory is none.
    """
    folders = list(dict.fromkeys(directories))
    for folder in folders:
        if not folder.is_dir():
            raise EvaluationError(f"{folder} is no directory; give an adapter's.", {"field": "adapter"})
    roots = tuple(dict.fromkeys(folder.resolve().parent for folder in folders))
    config = config.model_copy(update={"adapters": roots, "state_dir": None, "adapter_slots": max(1, len(folders))})
    compute = resolve_compute(config)
    torch.set_num_threads(compute.threads)
    demo = config.model == DEMO
    base = load_base(
        str(prepare_demo_base(config.cache_dir, wheel=config.demo_wheel)) if demo else config.model,
        device=compute.device,
        compute_dtype=compute.dtype,
        cache_dir=config.cache_dir,
        name=BASE_NAME if demo else "",
        progress=progress,
    )
    if config.kv_cache_bytes == "auto":  # which on CUDA would leave nothing for a second model
        blocks = -(-max(_KV_TOKENS, context) // config.block_size)
        kv_cache_bytes = ByteSize(blocks * base.kv_block_bytes(config.block_size))
        config = config.model_copy(update={"kv_cache_bytes": kv_cache_bytes})
    app = assemble(config, compute, base, PolicyHolder(config.policy))
    app.manager.start()
    app.engine.start()
    try:
        references: dict[Path, str] = {}
        for number, folder in enumerate(folders):
            references[folder] = _id_of(folder, number, set(references.values()))
            app.manager.load(references[folder], folder.resolve())
        yield LocalEngine(app, references)
    finally:
        app.engine.stop()
        app.tokenizers.close()
        app.manager.close()
        app.state.close()


def _id_of(folder: Path, number: int, taken: set[str]) -> str:
    """The folder's name where that is an id and not taken."""
    name = folder.resolve().name
    try:
        is_id = parse_reference(name).name == name
    except AdapterIdError:
        is_id = False
    return name if is_id and name not in taken else f"adapter-{number}"
