"""The other runtime: llama.cpp through llama-cpp-python, on a GGUF file of the same model.

It runs in a process of its own. In one process there would be two pools of OpenMP threads, torch's and llama.cpp's,
and the threads of the one still spin for work when the other begins; llama.cpp's own barriers spin, too, so a core
that is taken away from it for a moment costs it the whole step. With sides that take turns and a process that sleeps
in a read when it is not asked, each has the cores for itself. Times are taken inside, so the pipe costs it nothing.

llama.cpp is compiled when it is installed, for the processor that it is compiled on; a wheel from elsewhere may be
slower. It gets the better of what can be chosen: flash attention or not, adapters in F32 or F16, whichever decodes the
largest batch of mixed adapters faster here. The likeliest token is picked by numpy, within the step time, as torch
picks it within the step time of the other sides.
"""

import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf_lora import write_gguf_lora
from measurement import Run
from workload import in_turn

WORKER = Path(__file__).resolve().parent / "llama_worker.py"
INSTALL = "pip install -c constraints.txt -e '.[peers]', which compiles it for several minutes"
CALIBRATION_PROMPT = 8
CALIBRATION_TOKENS = 4


def why_missing(gguf_file: Path | None) -> str | None:
    """Why llama.cpp cannot take part; None when it can."""
    if importlib.util.find_spec("llama_cpp") is None:
        return f"llama-cpp-python is not installed ({INSTALL})"
    if gguf_file is None:
        return "it needs the model as a GGUF file (--gguf)"
    return None


class LlamaSide:
    """A started worker with adapters loaded. Close it at the end.

    Args:
        gguf_file: the model.
        lora_files: the adapters, in GGUF, by id.
        threads: CPU threads.
        streams: at the same time, at most.
        tokens: of each stream, prompt included, at most.
        flash: whether attention is llama.cpp's flash attention.

    Attributes:
        version: of llama-cpp-python.
        system: what llama.cpp was compiled for, in its own words.
    """

    def __init__(
        self, gguf_file: Path, lora_files: dict[str, Path], *, threads: int, streams: int, tokens: int, flash: bool
    ) -> None:
        self._number = {name: i for i, name in enumerate(lora_files)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        hello = self._ask(
            gguf=str(gguf_file),
            adapters=[str(path) for path in lora_files.values()],
            threads=threads,
            streams=streams,
            tokens=tokens,
            flash=flash,
        )
        self.version: str = hello["version"]
        self.system: str = hello["system"].strip()

    def close(self) -> None:
        """End the worker."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()

    def run(self, prompts: list[list[int]], adapter_ids: Sequence[str] | None, new_tokens: int) -> Run:
        """Generate greedily for all prompts at once.

        Args:
            prompts: of one length.
            adapter_ids: one for each prompt; None asks the base.
            new_tokens: for each prompt.
        """
        adapters = [None] * len(prompts) if adapter_ids is None else [self._number[name] for name in adapter_ids]
        answer = self._ask(operation="run", prompts=prompts, adapters=adapters, new_tokens=new_tokens)
        return Run(**answer, output_tokens=len(prompts) * new_tokens)

    def last_logits(self, prompt: list[int], adapter_id: str | None) -> torch.Tensor:
        """The logits of the token after a prompt, float32 [vocabulary]; None asks the base."""
        adapter = None if adapter_id is None else self._number[adapter_id]
        return torch.tensor(self._ask(operation="last_logits", prompt=prompt, adapter=adapter))

    def _ask(self, **request: Any) -> Any:
        """Send a request and wait for its answer.

        Raises:
            RuntimeError: the worker ended; it said why on stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"llama.cpp ended with status {self._process.wait()}; see its message above")
        return json.loads(line)


def fastest_llama(
    gguf_file: Path,
    base: Path,
    adapters: Path,
    ids: Sequence[str],
    prompts: list[list[int]],
    *,
    threads: int,
    tokens: int,
) -> tuple[LlamaSide, dict[str, Any]]:
    """llama.cpp with the choices that decode a batch of mixed adapters fastest here.

    Args:
        gguf_file: the model.
        base: its directory for transformers.
        adapters: folder with one subfolder for each adapter; the GGUF files come beside them.
        ids: the subfolders.
        prompts: of the batch.
        threads: CPU threads.
        tokens: of each stream, prompt included, at most.

    Returns:
        The started side, and what was chosen.
    """
    short = [prompt[:CALIBRATION_PROMPT] for prompt in prompts]
    kept: tuple[float, LlamaSide, dict[str, Any]] | None = None
    for name, flash in itertools.product(("F32", "F16"), (True, False)):
        data_type = gguf.GGMLQuantizationType[name]
        files = {each: adapters / f"{each}.{name}.gguf" for each in ids}
        for each, file in files.items():
            if not file.exists():
                write_gguf_lora(adapters / each, base, file, data_type)
        side = LlamaSide(gguf_file, files, threads=threads, streams=len(prompts), tokens=tokens, flash=flash)
        step_ms = side.run(short, in_turn(ids, len(prompts)), CALIBRATION_TOKENS).step_ms
        chosen = {"flash_attention": flash, "adapters": name}
        sys.stderr.write(f"  llama.cpp with {chosen}: {step_ms:.1f} ms/step at {len(prompts)} streams\n")
        if kept is None or step_ms < kept[0]:
            if kept is not None:
                kept[1].close()
            kept = (step_ms, side, chosen)
        else:
            side.close()
    assert kept is not None
    return kept[1], {**kept[2], "compiled_for": kept[1].system}
