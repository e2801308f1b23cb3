"""Requests are checked field by field, and what is wrong is named."""

import dataclasses

import pytest
from lorikeet.adapters.adaptation import Adaptation
from lorikeet.adapters.composition import Wish
from lorikeet.adapters.errors import AdapterDigestError, AdapterIdError
from lorikeet.adapters.version import AdapterVersion
from lorikeet.protos.v1 import generation_pb2 as pb
from lorikeet.server import convert
from lorikeet.server.engine.request import Delta, Finished, FinishReason, TokenLogprob
from lorikeet.server.engine.sampling_params import SamplingParams
from lorikeet.server.errors import BadRequestError, PromptTooLongError
from lorikeet.server.prompts import ChatPrompt, TextPrompt, TokenPrompt


def request(**fields):
    sampling = {name: fields.pop(name) for name in pb.Sampling.DESCRIPTOR.fields_by_name if name in fields}
    stopping = {name: fields.pop(name) for name in pb.Stopping.DESCRIPTOR.fields_by_name if name in fields}
    if not {"prompt", "messages", "token_ids"} & fields.keys():
        fields["prompt"] = "x"
    return pb.GenerateRequest(sampling=pb.Sampling(**sampling), stopping=pb.Stopping(**stopping), **fields)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"temperature": -1}, "sampling.temperature"),
        ({"temperature": float("nan")}, "sampling.temperature"),
        ({"temperature": 101}, "sampling.temperature"),
        ({"top_k": -1}, "sampling.top_k"),
        ({"top_p": 0}, "sampling.top_p"),
        ({"top_p": 1.5}, "sampling.top_p"),
        ({"min_p": -0.1}, "sampling.min_p"),
        ({"repetition_penalty": 0}, "sampling.repetition_penalty"),
        ({"presence_penalty": 3}, "sampling.presence_penalty"),
        ({"frequency_penalty": -3}, "sampling.frequency_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"min_tokens": -1}, "stopping.min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "stopping.min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"stop": [""]}, "stopping.stop"),
        ({"stop": ["x"] * 17}, "stopping.stop"),
        ({"stop": ["x" * 257]}, "stopping.stop"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x", "token_ids": [1]}, "token_ids"),
        ({"prompt": "x", "messages": [pb.Message(role="user", content="x")]}, "messages"),
        ({"prompt": "", "token_ids": [1]}, "token_ids"),
        ({"messages": [pb.Message(content="x")]}, "messages[0].role"),
        ({"routing_key": "x" * 257}, "routing_key"),
        ({"routing_key": "a\nb"}, "routing_key"),
        ({"routing_key": "a\0"}, "routing_key"),
    ],
    ids=str,
)
def test_bad_field_is_refused_by_name(fields, field):
    with pytest.raises(BadRequestError) as caught:
        convert.parse_generation(request(**fields))
    assert caught.value.metadata["field"] == field
    assert field.rpartition(".")[2].partition("[")[0] in caught.value.message


def test_request_without_prompt_is_refused():
    with pytest.raises(BadRequestError, match="exactly one of prompt, messages and token_ids; this one has none"):
        convert.parse_generation(pb.GenerateRequest())


@pytest.mark.parametrize(
    "adapter_id", ["../kjv", "a/b", ".hidden", "-x", "x" * 129, "käse", "a b", "a\n", "@abcd", "a/b@abcd"]
)
def test_malformed_adapter_id_is_refused(adapter_id):
    with pytest.raises(AdapterIdError) as caught:
        convert.parse_generation(request(adapter_id=adapter_id))
    assert caught.value.metadata["field"] == "adapter_id"


@pytest.mark.parametrize("prefix", ["", "abc", "wxyz", "a" * 65, "abcd@abcd"])
def test_malformed_digest_prefix_is_refused(prefix):
    with pytest.raises(AdapterDigestError) as caught:
        convert.parse_generation(request(adapter_id=f"kjv@{prefix}"))
    assert caught.value.metadata["field"] == "adapter_id"


def test_reference_is_kept():
    parsed = convert.parse_generation(request(adapter_id="kjv@ABCD", routing_key="Käthe 7"))
    assert (parsed.wishes, parsed.routing_key) == ((Wish("kjv@ABCD", 1.0, "adapter_id"),), "Käthe 7")
    parsed = convert.parse_generation(request(routing_key="x" * 256))
    assert (parsed.wishes, len(parsed.routing_key)) == ((), 256)


def test_unset_fields_get_the_defaults_of_sampling_params():
    parsed = convert.parse_generation(pb.GenerateRequest(prompt="x"))
    assert parsed.params == SamplingParams(max_tokens=convert.DEFAULT_MAX_TOKENS)
    assert parsed.max_tokens is None
    assert (parsed.wishes, parsed.is_composed, parsed.routing_key) == ((), False, "")


def test_zero_is_not_unset():
    parsed = convert.parse_generation(request(temperature=0, seed=0, logprobs=0))
    assert parsed.params.greedy
    assert (parsed.params.seed, parsed.params.logprobs) == (0, 0)


def test_every_field_arrives():
    values = {
        "temperature": 0.5, "top_k": 3, "top_p": 0.25, "min_p": 0.125, "repetition_penalty": 1.5,
        "presence_penalty": -0.5, "frequency_penalty": 0.75, "seed": 2**63, "max_tokens": 9, "min_tokens": 2,
        "stop": ("a", "b"), "stop_token_ids": (5, 6), "include_stop": True, "ignore_eos": True, "logprobs": 4,
    }  # fmt: skip
    assert values.keys() == {field.name for field in dataclasses.fields(SamplingParams)}
    parsed = convert.parse_generation(request(**values))
    assert parsed.params == SamplingParams(**values)


def test_the_three_forms_of_a_prompt():
    assert convert.parse_generation(request(prompt="p")).prompt == TextPrompt("p")
    assert convert.parse_generation(request(token_ids=[1, 2])).prompt == TokenPrompt((1, 2))
    chat = request(messages=[pb.Message(role="user", content="hi")])
    assert convert.parse_generation(chat).prompt == ChatPrompt((("user", "hi"),))


@pytest.mark.parametrize(
    ("max_tokens", "prompt_tokens", "fits"), [(None, 10, 90), (90, 10, 90), (1, 99, 1), (None, 99, 1), (5, 1, 5)]
)
def test_max_tokens_within_the_context(max_tokens, prompt_tokens, fits):
    assert convert.fit_max_tokens(max_tokens, prompt_tokens, 100) == fits


def test_unset_max_tokens_is_at_most_the_documented_default():
    assert convert.fit_max_tokens(None, 10, 100_000) == 256


@pytest.mark.parametrize(
    ("max_tokens", "prompt_tokens", "message"),
    [
        (
            91,
            10,
            r"10 tokens; with max_tokens 91 .* is 101, and the context holds 100\. .* lower max_tokens to 90",
        ),
        (1, 100, "100 tokens; .* 101, .*shorten the prompt"),
        (None, 100, "100 tokens; with at least one token"),
        (None, 5000, "5000 tokens"),
    ],
)
def test_prompt_beyond_the_context_is_refused(max_tokens, prompt_tokens, message):
    with pytest.raises(PromptTooLongError, match=message) as caught:
        convert.fit_max_tokens(max_tokens, prompt_tokens, 100)
    assert caught.value.metadata["max_context"] == "100"


def test_stream_and_unary_answers_say_the_same():
    by = convert.answering(Adaptation.single(AdapterVersion("kjv", "d" * 64)), is_composed=False)
    logprob = TokenLogprob(7, -0.5, ((7, -0.5), (8, -1.0)))
    deltas = [Delta("He", (7,), (logprob,)), Delta("llo", (8, 9))]
    end = Finished(FinishReason.STOP, 4, 2, 3, stop="END")
    whole = convert.unary_response("id", by, deltas, end)
    parts = [convert.stream_response(event) for event in [*deltas, end]]
    assert whole.text == "".join(part.delta.text for part in parts) == "Hello"
    assert list(whole.token_ids) == [token for part in parts for token in part.delta.token_ids] == [7, 8, 9]
    assert list(whole.logprobs) == list(parts[0].delta.logprobs)
    assert [(top.token_id, top.logprob) for top in whole.logprobs[0].top] == [(7, -0.5), (8, -1.0)]
    finished = parts[-1].finished
    assert whole.usage == finished.usage == pb.Usage(prompt_tokens=4, cached_tokens=2, generated_tokens=3)
    assert whole.finish_reason == finished.finish_reason == pb.FINISH_REASON_STOP
    assert whole.stop_string == finished.stop_string == "END"
    assert whole.adapter == convert.started("id", by, 4).started.adapter
    assert whole.adapter.version == "d" * 64


@pytest.mark.parametrize(("stop", "field"), [(0, "stop_token_id"), ("x", "stop_string"), (None, None)])
def test_what_stopped_an_output(stop, field):
    end = Finished(FinishReason.STOP, 1, 0, 1, stop=stop)
    base = convert.answering(None, is_composed=False)
    assert convert.unary_response("id", base, [], end).WhichOneof("stopped_by") == field
    assert convert.stream_response(end).finished.WhichOneof("stopped_by") == field


def test_base_answers_have_an_empty_version():
    base = convert.answering(None, is_composed=False)
    assert (base.adapter, base.adapters) == (pb.AdapterVersion(), ())
