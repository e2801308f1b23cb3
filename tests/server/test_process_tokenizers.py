"""Adapters with tokenizers of their own on a real server: templates, new tokens, and PEFT as the judge."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lorikeet.server.client import LorikeetClient
from lorikeet.server.golden_reference import reference_logits
from lorikeet.server.status import RemoteError
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..tiny import TEXT, save_tiny_adapter
from .process import ServerProcess, eventually, running_server

NEW_TOKENS = ["<zorp>", "quux", "<|call|>"]
OTHER_TEMPLATE = "{% for message in messages %}({{ message.content }}){% endfor %}{{ eos_token }}"
SLOW_TEMPLATE = (
    "{% if messages[0].content == 'go' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    "{% endif %}{{ messages[0].content }}"
)


def save_extended(model: Path, directory: Path, *, with_tokenizer: bool = True) -> None:
    """An adapter as TRL saves one: new tokens, embeddings and head of its own, its tokenizer beside it."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(NEW_TOKENS[:2])
    tokenizer.add_special_tokens({"additional_special_tokens": NEW_TOKENS[2:]})
    torch.manual_seed(11)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "lm_head"], init_lora_weights=False
    )
    adapted = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                # Answers are of the new tokens, mostly.
                parameter[-len(NEW_TOKENS) :].normal_(std=0.5)
    adapted.save_pretrained(directory)
    if with_tokenizer:
        tokenizer.save_pretrained(directory)


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own-tokenizers")
    save_extended(tiny_model, folder / "extended")
    for seed, (name, template) in enumerate({"plain": None, "other": OTHER_TEMPLATE, "slow": SLOW_TEMPLATE}.items()):
        save_tiny_adapter(tiny_model, folder / name, seed=seed, rank=4)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.chat_template = template or tokenizer.chat_template
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def own_server(server_arguments, adapters, tmp_path_factory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(log, *server_arguments, "--adapters", str(adapters), "--kv-cache-bytes", "32MiB") as server:
        yield server


@pytest.fixture
def client(own_server):
    with LorikeetClient(own_server.address, timeout_s=60) as client:
        yield client


def test_new_tokens_are_read_and_written(client, adapters, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(adapters / "extended")
    prompt = "the cat <zorp> and quux<|call|> look"
    ids = tokenizer.encode(prompt)
    assert max(ids) == len(tokenizer) - 1
    answer = client.generate(prompt=prompt, adapter_id="extended", temperature=0.0, max_tokens=24, ignore_eos=True)
    same = client.generate(token_ids=ids, adapter_id="extended", temperature=0.0, max_tokens=24, ignore_eos=True)
    assert list(answer.token_ids) == list(same.token_ids)
    assert answer.usage.prompt_tokens == len(ids)
    assert (
        answer.text
        == tokenizer.decode(ids + list(answer.token_ids), skip_special_tokens=True)[
            len(tokenizer.decode(ids, skip_special_tokens=True)) :
        ]
    )
    assert max(answer.token_ids) >= len(tokenizer) - len(NEW_TOKENS)
    # PEFT on the same NF4 base finds each token the likeliest one, too, within float32's noise.
    out = list(answer.token_ids)
    prompts = [ids + out[:count] for count in range(0, len(out), 3)]
    logits = reference_logits(
        tiny_model, adapters / "extended", prompts, vocab_size=len(tokenizer), progress=False
    ).adapted
    assert logits.shape[-1] == len(tokenizer)
    for row, token in zip(logits, out[::3], strict=True):
        assert row.max() - row[token] < 1e-3


def test_ids_of_new_tokens_are_that_adapter_s_only(client, tiny_model, adapters):
    last = len(AutoTokenizer.from_pretrained(adapters / "extended")) - 1
    for adapter_id in ("", "plain"):
        with pytest.raises(RemoteError, match="vocabulary is 0 to") as caught:
            client.generate(token_ids=[5, last], adapter_id=adapter_id, max_tokens=2)
        assert caught.value.code == "INVALID_ARGUMENT"
    with pytest.raises(RemoteError, match=f"the adapter's vocabulary is 0 to {last}"):
        client.generate(token_ids=[5, last + 1], adapter_id="extended", max_tokens=2)
    # A text that only looks like a new token is text to the others.
    assert client.generate(prompt="<zorp>", max_tokens=2).usage.prompt_tokens > 1


def test_own_template_and_own_end(client, adapters, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    messages = [("user", TEXT[0])]
    ids = tokenizer.encode(f"({TEXT[0]})<eos>", add_special_tokens=False)
    other = client.generate(messages=messages, adapter_id="other", temperature=0.0, max_tokens=8, ignore_eos=True)
    same = client.generate(token_ids=ids, adapter_id="other", temperature=0.0, max_tokens=8, ignore_eos=True)
    assert list(other.token_ids) == list(same.token_ids)
    assert other.usage.prompt_tokens == len(ids)
    plain = client.generate(messages=messages, adapter_id="plain", max_tokens=2)
    assert plain.usage.prompt_tokens != len(ids)


def test_a_template_that_does_not_end_stops_nobody(own_server, client):
    with LorikeetClient(own_server.address, timeout_s=60) as hanging:
        call = hanging.stream(messages=[("user", "go")], adapter_id="slow", max_tokens=4)
        for adapter_id in ("", "plain", "other"):
            assert client.generate(messages=[("user", "hello")], adapter_id=adapter_id, max_tokens=2).token_ids
        with pytest.raises(RemoteError, match="chat template took more than"):
            list(call)
    assert client.generate(messages=[("user", "wait")], adapter_id="slow", max_tokens=2).token_ids
    assert eventually(own_server.is_idle)


def test_a_changed_template_is_a_new_version(client, adapters):
    before = client.get_adapter("other").version
    (adapters / "other" / "chat_template.jinja").write_text(OTHER_TEMPLATE + " ")
    assert eventually(lambda: client.get_adapter("other").version != before)


def test_a_broken_tokenizer_is_refused_and_the_version_before_serves_on(client, adapters, tiny_model, tmp_path):
    (adapters / "plain" / "tokenizer.json").write_text('{"version": "1.0", "model": {')
    assert eventually(lambda: "tokenizer" in client.get_adapter("plain").error)
    assert client.generate(prompt=TEXT[0], adapter_id="plain", max_tokens=2).token_ids


def test_new_tokens_without_rows_are_refused(client, adapters, tiny_model):
    save_tiny_adapter(tiny_model, adapters / "rowless", seed=9, rank=2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(NEW_TOKENS)
    tokenizer.save_pretrained(adapters / "rowless")
    with pytest.raises(RemoteError, match="'<zorp>' the id"):
        client.load_adapter("rowless")
