"""Perplexity and continuations with transformers and PEFT, independent of the server."""

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 8
IGNORED = -100


@torch.inference_mode()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[float, int]:
    """Perplexity over all tokens of `texts` but the first of each text, each text on its own.

    No special token is added, and nothing is cut. Returns the perplexity and the number of tokens predicted.
    """
    model.eval()
    loss_sum, count = 0.0, 0
    tokenizer.padding_side = "right"
    for start in range(0, len(texts), BATCH):
        rows = list(texts[start : start + BATCH])
        inputs = tokenizer(rows, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, IGNORED)[:, 1:]
        logits = model(**inputs).logits[:, :-1].float()
        loss_sum += cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED).item()
        count += int((labels != IGNORED).sum())
    return math.exp(loss_sum / count), count


@torch.inference_mode()
def continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int, seed: int | None = None
) -> str:
    """Greedy continuation of a plain prompt, or sampled (temperature 0.8, top-p 0.95) with a seed."""
    model.eval()
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    options: dict[str, object] = {"do_sample": False}
    if seed is not None:
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}
    output = model.generate(**inputs, max_new_tokens=tokens, **options)
    text: str = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return text
