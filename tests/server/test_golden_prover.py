"""The prover on an engine that does whatever a test wants: what is held is given back, and nobody waits for ever."""

import secrets
import threading
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from lorikeet.adapters.adaptation import Adaptation
from lorikeet.adapters.errors import (
    AdapterInvalidError,
    AdapterNotReadyError,
    AdapterProofError,
    AdapterUnloadedError,
    ServingError,
)
from lorikeet.adapters.golden import Golden
from lorikeet.adapters.version import AdapterVersion
from lorikeet.server.engine.errors import NonFiniteLogitsError
from lorikeet.server.engine.request import Delta, Failed, Finished, FinishReason, Request
from lorikeet.server.errors import (
    CancelledError,
    DrainingError,
    EngineDeadError,
    PromptTooLongError,
    QueueFullError,
)
from lorikeet.server.proof import GoldenProver

VOCAB = 97
VERSION = AdapterVersion("support-bot", secrets.token_hex(32), 3)
PROMPTS = ((5, 6, 7), (8,), (5, 6), (90, 1, 2, 3))


class ScriptedEngine:
    """Answers each request on a thread of its own, as `answer` says; keeps the books of pins as the real one does."""

    def __init__(self, answer: Callable[["ScriptedEngine", Request, int], None]) -> None:
        self.answer = answer
        self.refuse: dict[int, ServingError] = {}  # by number of the request
        self.pins: Counter[AdapterVersion] = Counter()
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.threads: list[threading.Thread] = []
        self._live: dict[str, Request] = {}
        self._lock = threading.Lock()

    def submit(self, request: Request) -> None:
        index = len(self.requests)
        self.requests.append(request)
        if index in self.refuse:
            raise self.refuse[index]
        self._live[request.request_id] = request
        self.threads.append(threading.Thread(target=self.answer, args=(self, request, index)))
        self.threads[-1].start()

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.end(request_id, Failed(CancelledError("cancelled")))

    def hold(self, version: AdapterVersion) -> None:
        with self._lock:
            self.pins[version] += 1

    def release(self, version: AdapterVersion) -> None:
        with self._lock:
            assert self.pins[version] > 0
            self.pins[version] -= 1

    def finish(self, request: Request, row: torch.Tensor) -> None:
        request.capture(row)
        request.emit(Delta("x", (1,)))
        self.end(request.request_id, Finished(FinishReason.LENGTH, len(request.prompt_token_ids), 0, 1))

    def end(self, request_id: str, event: Finished | Failed) -> None:
        request = self._live.pop(request_id, None)
        if request is not None:
            self.release(*request.adapter.versions)
            request.emit(event)

    def pins_left(self) -> int:
        """Once all threads have ended."""
        for thread in self.threads:
            thread.join(90)
        return self.pins.total()


def golden() -> Golden:
    return Golden(VERSION.digest, PROMPTS, torch.randn(len(PROMPTS), VOCAB) * 3, 0.2, "a test", "org/base")


def world(answer: Callable[[ScriptedEngine, Request, int], None], timeout_s: float = 90.0, exact: bool = True):
    engine = ScriptedEngine(answer)
    prover = GoldenProver(engine, engine.hold, engine.release, timeout_s, vocab_size=VOCAB, exact=exact)
    return engine, prover


def test_each_prompt_runs_once_as_a_greedy_request_of_the_version():
    file = golden()
    # Backwards: answers come in any order.
    done = [threading.Event() for _ in range(len(PROMPTS) + 1)]
    done[-1].set()

    def answer(engine, request, index):
        done[index + 1].wait(90)
        engine.finish(request, file.logits[index])
        done[index].set()

    engine, prover = world(answer)
    assert prover(VERSION, file) == f"golden file: 4 prompts, largest difference 0 of {0.01:g}"
    assert tuple(tuple(request.prompt_token_ids) for request in engine.requests) == PROMPTS
    assert {request.adapter for request in engine.requests} == {Adaptation.single(VERSION)}
    assert all(request.params.greedy and request.params.max_tokens == 1 for request in engine.requests)
    assert engine.pins_left() == 0 and engine.aborted == []


def test_ids_are_unique_and_no_client_can_have_them():
    file = golden()
    engine, prover = world(lambda engine, request, index: engine.finish(request, file.logits[index % 4]))
    prover(VERSION, file)
    prover(VERSION, file)
    ids = [request.request_id for request in engine.requests]
    assert len(set(ids)) == 8
    assert all(name.startswith("golden/support-bot@") and "#" not in name for name in ids)


def test_logits_that_are_off_are_refused_with_the_numbers():
    file = golden()
    engine, prover = world(lambda engine, request, index: engine.finish(request, file.logits[index] * 1.5))
    with pytest.raises(AdapterProofError) as caught:
        prover(VERSION, file)
    for words in (str(VERSION), "4 prompts, largest difference", "of 0.01", "org/base", "lorikeet adapters golden"):
        assert words in caught.value.message
    assert float(caught.value.metadata["difference"]) > 0.01
    assert engine.pins_left() == 0


def test_prompts_are_not_mixed_up():
    file = golden()
    _, prover = world(lambda engine, request, index: engine.finish(request, file.logits[index ^ 1]), exact=False)
    with pytest.raises(AdapterProofError):
        prover(VERSION, file)


def test_arithmetic_decides_the_tolerance():
    file = golden()
    rows = file.logits + torch.randn(file.logits.shape) * 0.05
    for exact in (False, True):
        _, prover = world(lambda engine, request, index: engine.finish(request, rows[index]), exact=exact)
        if exact:
            with pytest.raises(AdapterProofError, match=r"of 0\.01"):
                prover(VERSION, file)
        else:
            assert prover(VERSION, file).endswith(" of 0.2")


def test_file_for_another_vocabulary_never_reaches_the_model():
    engine, _ = world(lambda engine, request, index: None)
    prover = GoldenProver(engine, engine.hold, engine.release, 20, vocab_size=VOCAB - 1, exact=True)
    with pytest.raises(AdapterInvalidError, match="vocabulary of 97; here it is 96"):
        prover(VERSION, golden())
    with pytest.raises(AdapterInvalidError, match="vocabulary of 97; here it is 101"):
        prover(VERSION, golden(), 101)
    assert engine.requests == []


def test_adapter_with_a_vocabulary_of_its_own():
    file = golden()
    engine, _ = world(lambda engine, request, index: engine.finish(request, file.logits[index]))
    prover = GoldenProver(engine, engine.hold, engine.release, 20, vocab_size=VOCAB - 3, exact=True)
    assert "4 prompts" in prover(VERSION, file, VOCAB)


@pytest.mark.parametrize("error", [QueueFullError("full"), DrainingError("ends"), EngineDeadError("dead")], ids=repr)
@pytest.mark.parametrize("at", [0, 2])
def test_refused_request_is_given_back_and_the_others_are_aborted(error, at):
    file = golden()
    engine, prover = world(lambda engine, request, index: None)  # never answers
    engine.refuse = {at: error}
    with pytest.raises(type(error)):
        prover(VERSION, file)
    assert engine.aborted == [request.request_id for request in engine.requests[:at]]
    assert engine.pins_left() == 0


def test_prompt_that_is_too_long_is_the_files_fault():
    engine, prover = world(lambda engine, request, index: None)
    engine.refuse = {1: PromptTooLongError("The prompt has 900 tokens; at most 511 fit.")}
    with pytest.raises(AdapterInvalidError, match=r"^lorikeet\.golden\.safetensors cannot be replayed here\. .* 900 "):
        prover(VERSION, golden())
    assert len(engine.aborted) == 1 and engine.pins_left() == 0


@pytest.mark.parametrize("error", [AdapterUnloadedError("gone"), EngineDeadError("dead")], ids=repr)
def test_failure_of_one_prompt_ends_all(error):
    file = golden()

    def answer(engine, request, index):
        if index == 1:
            engine.end(request.request_id, Failed(error))

    engine, prover = world(answer)
    with pytest.raises(type(error)):
        prover(VERSION, file)
    assert len(engine.aborted) == 3 and engine.pins_left() == 0


def test_adapter_whose_logits_are_no_numbers_is_refused():
    file = golden()

    def answer(engine, request, index):
        request.capture(torch.full((VOCAB,), torch.nan))
        engine.end(request.request_id, Failed(NonFiniteLogitsError("NaN")))

    _, prover = world(answer)
    with pytest.raises(AdapterProofError, match="not finite"):
        prover(VERSION, file)


def test_engine_that_does_not_answer_in_time_is_not_waited_for():
    file = golden()
    engine, prover = world(lambda engine, request, index: None, timeout_s=0.0)
    with pytest.raises(AdapterNotReadyError, match="not computed in time"):
        prover(VERSION, file)
    assert len(engine.aborted) == 4 and engine.pins_left() == 0


def test_logits_that_never_came_prove_nothing():
    file = golden()

    def answer(engine, request, index):
        engine.end(request.request_id, Finished(FinishReason.LENGTH, 1, 0, 1))

    _, prover = world(answer)
    with pytest.raises(ServingError, match="could not be compared"):
        prover(VERSION, file)
