"""llama.cpp as a peer, on a tiny model in float32: it computes what transformers and PEFT compute."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from .gguf_models import save_gguf_model
from .scripts import BENCHMARKS

pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed: pip install -c constraints.txt -e '.[peers]'"
)
gguf = pytest.importorskip("gguf")
peft = pytest.importorskip("peft")
ADAPTERS, STREAMS, PROMPT = 3, 5, 9
# Weights are in float32 on both sides, but llama.cpp keeps keys and values in float16 (11 bits); logits are about 4.
TOLERANCE = {"rtol": 0, "atol": 0.03}


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = ("effect", "gguf_lora", "llama_side", "workload")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def files(bench, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_gguf_model(tiny_model, folder / "model.gguf")
    names = bench.workload.write_random_adapters(tiny_model, folder, count=ADAPTERS, rank=4, seed=3)
    loras = {name: folder / f"{name}.gguf" for name in names}
    for name, file in loras.items():
        bench.gguf_lora.write_gguf_lora(folder / name, tiny_model, file, gguf.GGMLQuantizationType.F32)
    return SimpleNamespace(folder=folder, model=folder / "model.gguf", names=names, loras=loras)


@pytest.fixture(scope="module", params=[True, False], ids=["flash", "plain"])
def llama(bench, files, request):
    side = bench.llama_side.LlamaSide(
        files.model, files.loras, threads=1, streams=STREAMS, tokens=32, flash=request.param
    )
    yield side
    side.close()


@pytest.fixture(scope="module")
def prompts(bench):
    return bench.workload.Workload(STREAMS, PROMPT, 4).prompts(384, seed=5)


@pytest.fixture(scope="module")
def expected(files, tiny_model, prompts):
    """Logits after the first prompt: of the base, and with each adapter."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = torch.tensor(prompts[:1])
    with torch.inference_mode():
        alone = base(ids).logits[0, -1]
        model = peft.PeftModel.from_pretrained(base, files.folder / files.names[0], adapter_name=files.names[0])
        logits = {}
        for name in files.names:
            if name != files.names[0]:
                model.load_adapter(files.folder / name, adapter_name=name)
            model.set_adapter(name)
            logits[name] = model(ids).logits[0, -1]
    return alone, logits


def test_base_logits_are_those_of_transformers(llama, prompts, expected):
    torch.testing.assert_close(llama.last_logits(prompts[0], None), expected[0], **TOLERANCE)


def test_each_adapter_adds_what_it_adds_in_peft(bench, files, llama, prompts, expected):
    base, logits = expected
    found = {name: llama.last_logits(prompts[0], name) for name in files.names}
    for name in files.names:
        torch.testing.assert_close(found[name], logits[name], **TOLERANCE)
    added = [torch.stack([each[name] for name in files.names]) - base for each in (found, logits)]
    effect = bench.effect.Effect.of(*added)
    assert effect.same.low > 0.999
    assert effect.others.high < 0.9


def test_rows_of_b_that_are_not_interleaved_are_another_adapter(
    bench, files, tiny_model, prompts, expected, monkeypatch
):
    base, logits = expected
    name = files.names[0]
    monkeypatch.setattr(bench.gguf_lora, "in_gguf_order", lambda module, rows, config: rows)
    wrong = files.folder / "wrong.gguf"
    bench.gguf_lora.write_gguf_lora(files.folder / name, tiny_model, wrong, gguf.GGMLQuantizationType.F32)
    side = bench.llama_side.LlamaSide(files.model, {name: wrong}, threads=1, streams=1, tokens=32, flash=True)
    try:
        added = side.last_logits(prompts[0], name) - base
    finally:
        side.close()
    assert torch.cosine_similarity(added, logits[name] - base, dim=0) < 0.95


def test_mixed_streams_generate_what_each_generates_alone(files, llama, prompts):
    mixed = [files.names[stream % ADAPTERS] for stream in range(STREAMS)]
    together = llama.run(prompts, mixed, 6)
    alone = [llama.run([prompt], [name], 6).tokens[0] for prompt, name in zip(prompts, mixed, strict=True)]
    assert together.tokens == alone
    assert len(together.steps_s) == 5
    assert together.output_tokens == STREAMS * 6
    assert 0 < sum(together.steps_s) < together.wall_s


def test_a_run_forgets_the_one_before(llama, prompts):
    assert llama.run(prompts, None, 3).tokens == llama.run(prompts, None, 3).tokens


def test_a_worker_that_cannot_start_says_so(bench, files, capfd):
    with pytest.raises(RuntimeError, match="ended with status 1"):
        bench.llama_side.LlamaSide(files.folder / "no.gguf", {}, threads=1, streams=1, tokens=8, flash=True)
    assert "llama.cpp could not make the model" in capfd.readouterr().err
