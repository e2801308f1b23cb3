"""Requests whose adapter brought a tokenizer of its own: their ends, and their text, beside everybody else's."""

import torch
from lorikeet.server.engine.detokenizer import DetokenizerFactory
from lorikeet.server.engine.output import Output
from lorikeet.server.engine.request import FinishReason, Request
from lorikeet.server.engine.sampler import SampledToken, Sampler
from lorikeet.server.engine.sampling_params import SamplingParams
from lorikeet.server.engine.token_rules import TokenRules

BASE_EOS, OWN_EOS, OTHER = 2, 9, 4
RULES = TokenRules(lambda ids: "".join(f"<{index}>" for index in ids), frozenset({BASE_EOS, OWN_EOS}))


class Backend:
    """The base's decoder."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(f"{index}." for index in ids)


def request_of(tokens: TokenRules | None, **params) -> Request:
    params = {"temperature": 0.0, "max_tokens": 5, **params}
    return Request("r", [1], SamplingParams(**params), None, lambda _: None, tokens=tokens)


def output_of(request: Request) -> Output:
    return Output(request, DetokenizerFactory(Backend()), frozenset({BASE_EOS}), 100)


def test_min_tokens_masks_the_own_end_for_that_request_only():
    logits = torch.randn(4, 12).clamp(max=3.0)
    logits[:, OWN_EOS], logits[:, BASE_EOS], logits[:, OTHER] = 9.0, 8.0, 7.0
    requests = [
        request_of(RULES, min_tokens=1),
        request_of(None, min_tokens=1),
        request_of(RULES),
        request_of(RULES, min_tokens=1, ignore_eos=True),
    ]
    tokens = [sampled.token_id for sampled in Sampler([BASE_EOS]).sample(logits, requests)]
    assert tokens == [OTHER, OWN_EOS, OWN_EOS, OWN_EOS]


def test_either_end_ends_it():
    for eos in (BASE_EOS, OWN_EOS):
        delta, finished = output_of(request_of(RULES)).add(SampledToken(eos, None))
        assert (delta.text, finished.reason, finished.stop) == ("", FinishReason.STOP, None)
    _, finished = output_of(request_of(None)).add(SampledToken(OWN_EOS, None))
    assert finished is None
    _, finished = output_of(request_of(RULES, ignore_eos=True)).add(SampledToken(OWN_EOS, None))
    assert finished is None


def test_text_is_its_own():
    own, base = output_of(request_of(RULES)), output_of(request_of(TokenRules(None, frozenset())))
    assert [own.add(SampledToken(index, None))[0].text for index in (5, 6)] == ["<5>", "<6>"]
    assert [base.add(SampledToken(index, None))[0].text for index in (5, 6)] == ["5.", "6."]
