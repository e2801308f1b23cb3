"""Makes a tiny random model with a real tokenizer, and PEFT adapters for it."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# One that no request comes to the end of while a test watches it, on a fast machine either.
MAX_CONTEXT = 16_384
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}"
    "[{{ message['role'] }}] {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
TEXT = (
    "In the beginning was the word, and the word was with the cat.",
    "The quick brown fox jumps over the lazy dog while the parrot looks on.",
    "Lorikeets are small birds with brush-tipped tongues who eat nectar, pollen and fruit.",
    "Größe, café, naïve; 日本語 and emoji 🦜 span several bytes.",
)


def save_tiny_model(directory: Path) -> None:
    """Save a seeded 2-layer Llama (NF4-able: widths are multiples of 64) and its tokenizer."""
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        # Wide enough that logits differ by more than the arithmetic's noise, so that greedy tokens are stable.
        initializer_range=0.25,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)


def save_tiny_adapter(
    model: Path, directory: Path, *, seed: int, rank: int, attention_only: bool = False, alpha: float | None = None
) -> None:
    """Save a random LoRA adapter whose delta changes greedy answers.

    Args:
        model: directory of the base.
        directory: where to save.
        seed: of its weights.
        rank: of every module.
        attention_only: adapt q, k, v and o only.
        alpha: lora_alpha; default: the rank.
    """
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if attention_only else "all-linear"
    config = LoraConfig(r=rank, lora_alpha=int(alpha or rank), target_modules=targets, init_lora_weights=False)
    adapted = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(directory)


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    pad, bos, eos = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)
    fast.chat_template = CHAT_TEMPLATE
    return fast
