"""llama.cpp in a process of its own: reads one request a line as JSON from stdin, answers each with one line.

Started by llama_side.py, which says why. Uses the C API as llama-cpp-python binds it, without its Python classes: one
`llama_decode` call takes one token of every sequence that has the same adapter, as llama.cpp's server does it
(`can_batch_with` in tools/server/server-context.cpp), and the rest of a step is numpy.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np

# A sequence's share of the key-value cache is rounded up to this by llama.cpp itself.
CELLS = 256
# `GGML_LOG_LEVEL_ERROR` in ggml.h
LOG_LEVEL_ERROR = 3


def main() -> None:
    """Serve requests until stdin ends. The first line holds the arguments of Peer."""
    answers = os.fdopen(os.dup(1), "w")
    # Whatever a library prints goes to stderr: stdout is the line of answers.
    os.dup2(2, 1)
    peer = Peer(**json.loads(sys.stdin.readline()))
    operations: dict[str, Callable[..., Any]] = {"run": peer.run, "last_logits": peer.last_logits}
    answer: Any = {"version": llama_cpp.__version__, "system": llama_cpp.llama_print_system_info().decode()}
    while True:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        line = sys.stdin.readline()
        if not line:
            return
        request = json.loads(line)
        answer = operations[request.pop("operation")](**request)


@dataclass(frozen=True, slots=True)
class Group:
    """Streams with one adapter: what one decode call takes.

    Attributes:
        adapter: its number; None for the base.
        streams: by number.
        first: sequence of the first stream; the others follow, as llama.cpp decodes only neighbours together.
    """

    adapter: int | None
    streams: list[int]
    first: int


class Peer:
    """A model with LoRA adapters, ready to run.

    Every sequence has its own part of the key-value cache (`kv_unified` off), so that none attends over the cells of
    the others; a whole prefill is one call; logits are made for the last token of each sequence only.

    Args:
        gguf: the model's file.
        adapters: the adapters' files.
        threads: for prefill and decode.
        streams: sequences at the same time, at most.
        tokens: of each sequence, prompt included, at most.
        flash: whether attention is llama.cpp's flash attention.
    """

    def __init__(
        self, *, gguf: str, adapters: Sequence[str], threads: int, streams: int, tokens: int, flash: bool
    ) -> None:
        self._log = llama_cpp.llama_log_callback(_log_errors)  # must live as long as it may be called
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(gguf.encode(), llama_cpp.llama_model_default_params())
        self._model = _made(model, "the model")
        self._adapters = [
            _made(llama_cpp.llama_adapter_lora_init(self._model, path.encode()), "an adapter") for path in adapters
        ]
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        params = llama_cpp.llama_context_default_params()
        params.n_threads = params.n_threads_batch = threads
        params.n_seq_max = params.n_outputs_max = streams
        params.n_ctx = streams * CELLS * -(-tokens // CELLS)
        params.n_batch = streams * tokens
        params.kv_unified = False
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if flash:
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = _made(llama_cpp.llama_init_from_model(self._model, params), "a context")
        self._batch = Batch(params.n_batch)

    def run(self, prompts: list[list[int]], adapters: list[int | None], new_tokens: int) -> dict[str, Any]:
        """Generate greedily for all prompts at once.

        Args:
            prompts: of one length.
            adapters: a number for each prompt; None asks the base.
            new_tokens: for each prompt.

        Returns:
            What measurement.Run holds, but for the number of output tokens.
        """
        groups = group_by_adapter(adapters)
        self._forget()
        chosen = np.empty((len(prompts), new_tokens), np.int32)
        cpu = time.process_time()
        marks = [time.perf_counter()]
        for step in range(new_tokens):
            for group in groups:
                if step == 0:
                    self._batch.fill(np.array([prompts[stream] for stream in group.streams]), group.first, 0)
                else:
                    tokens = chosen[group.streams, step - 1 : step]
                    self._batch.fill(tokens, group.first, len(prompts[0]) + step - 1)
                chosen[group.streams, step] = self._decode(group).argmax(-1)
            marks.append(time.perf_counter())
        return {
            "wall_s": marks[-1] - marks[0],
            "cpu_s": time.process_time() - cpu,
            # The first interval is the prefill.
            "steps_s": np.diff(marks[1:]).tolist(),
            "tokens": chosen.tolist(),
        }

    def last_logits(self, prompt: list[int], adapter: int | None) -> list[float]:
        """The logits of the token after a prompt."""
        self._forget()
        self._batch.fill(np.array([prompt]), 0, 0)
        logits: list[float] = self._decode(Group(adapter, [0], 0))[0].tolist()
        return logits

    def _forget(self) -> None:
        """Empty the key-value cache."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _decode(self, group: Group) -> np.ndarray:
        """Run the batch with a group's adapter; a view of its logits, float32 [streams, vocabulary]."""
        chosen = [] if group.adapter is None else [self._adapters[group.adapter]]
        pointers = (llama_cpp.llama_adapter_lora_p_ctypes * 1)()
        for i, adapter in enumerate(chosen):
            pointers[i] = ctypes.cast(adapter, llama_cpp.llama_adapter_lora_p_ctypes)
        # Does nothing where the adapter is the one that is set.
        llama_cpp.llama_set_adapters_lora(self._context, pointers, len(chosen), (ctypes.c_float * 1)(1.0))
        if status := llama_cpp.llama_decode(self._context, self._batch.struct):
            raise RuntimeError(f"llama_decode returned {status}")
        logits = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (len(group.streams), self._vocab_size))


class Batch:
    """A `llama_batch` over numpy arrays.

    Args:
        size: tokens, at most.
    """

    def __init__(self, size: int) -> None:
        self._token = np.zeros(size, np.int32)
        self._position = np.zeros(size, np.int32)
        self._sequence = np.zeros(size, np.int32)
        self._wants_logits = np.zeros(size, np.int8)
        # Each token is in one sequence; for each, llama.cpp wants the address of its list.
        self._sequences = np.ones(size, np.int32)
        self._sequence_at = self._sequence.ctypes.data + 4 * np.arange(size, dtype=np.uint64)
        self.struct = llama_cpp.llama_batch()
        types = dict(llama_cpp.llama_batch._fields_)
        for name, array in (
            ("token", self._token),
            ("pos", self._position),
            ("n_seq_id", self._sequences),
            ("seq_id", self._sequence_at),
            ("logits", self._wants_logits),
        ):
            setattr(self.struct, name, ctypes.cast(array.ctypes.data, types[name]))

    def fill(self, tokens: np.ndarray, first: int, position: int) -> None:
        """Put the next tokens of neighbouring sequences in; the last of each is to have logits.

        Args:
            tokens: integers [sequences, tokens].
            first: the first sequence.
            position: of the first token in each.
        """
        sequences, length = tokens.shape
        total = tokens.size
        self._token[:total] = tokens.reshape(-1)
        self._position[:total] = np.tile(np.arange(position, position + length), sequences)
        self._sequence[:total] = np.repeat(np.arange(first, first + sequences), length)
        self._wants_logits[:total] = np.tile(np.arange(length) == length - 1, sequences)
        self.struct.n_tokens = total


def group_by_adapter(adapters: Sequence[int | None]) -> list[Group]:
    """The streams of each adapter, with neighbouring sequences."""
    streams_of: dict[int | None, list[int]] = {}
    for stream, adapter in enumerate(adapters):
        streams_of.setdefault(adapter, []).append(stream)
    groups: list[Group] = []
    for adapter, streams in streams_of.items():
        groups.append(Group(adapter, streams, sum(len(group.streams) for group in groups)))
    return groups


def _made(pointer: Any, what: str) -> Any:
    """A pointer that is not null."""
    if not pointer:
        raise RuntimeError(f"llama.cpp could not make {what}")
    return pointer


def _log_errors(level: int, text: bytes, _: Any) -> None:
    """Errors go to stderr; llama.cpp is silent about the rest."""
    if level == LOG_LEVEL_ERROR:
        sys.stderr.write(text.decode(errors="replace"))


if __name__ == "__main__":
    main()
