"""The likeliest token of every row of a step, found on the device and brought to the host by one copy."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Winners:
    """Buffers of one step's results: token ids and their logits, beside each other. Step thread only."""

    def __init__(self) -> None:
        self._words = torch.empty(0, dtype=torch.int64)
        self._host = self._words
        self._copied: torch.cuda.Event | None = None
        self._count = 0

    def find(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The largest value of each row and its column; NaN where a row has one.

        Args:
            logits: float32 [n, vocab].

        Returns:
            float32 [n] and int64 [n], views that are right until the next call; tokens may be changed before `fetch`.
        """
        self._count = count = len(logits)
        if self._words.device != logits.device or len(self._words) < 2 * count:
            self._allocate(max(2 * count, 64), logits.device)
        tokens = self._words[:count]
        best = self._words[count : 2 * count].view(torch.float32)[:count]
        if logits.is_cpu:
            rows, columns = logits.numpy(), tokens.numpy()
            # `torch.max` with indices is scalar code on a CPU: 32 rows of 49,152 take it 4.5 ms, this 0.15 ms (one core
            # of an AMD EPYC, Zen 3, torch 2.13.0, NumPy 2.4.6; 2026-11-23).
            np.argmax(rows, axis=-1, out=columns)
            best.numpy()[:] = rows[np.arange(count), columns]
        else:
            torch.max(logits, -1, out=(best, tokens))
        return best, tokens

    def fetch(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """What `find` found, on the host, right until the next `find`; the one wait of a step for the device."""
        words = self._count + (self._count + 1) // 2
        if self._copied is not None:
            self._host[:words].copy_(self._words[:words], non_blocking=True)
            self._copied.record(torch.cuda.current_stream(self._words.device))
            self._copied.synchronize()
        host = self._host.numpy()
        return host[self._count : words].view(np.float32)[: self._count], host[: self._count]

    def _allocate(self, words: int, device: torch.device) -> None:
        self._words = torch.empty(words, dtype=torch.int64, device=device)
        self._host, self._copied = self._words, None
        if device.type == "cuda":
            self._host = torch.empty(words, dtype=torch.int64, pin_memory=True)
            self._copied = torch.cuda.Event()
