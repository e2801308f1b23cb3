"""Every recipe trains, saves and is measured, on a tiny random base; the real runs take minutes each."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
EXAMPLES = Path(__file__).parents[2] / "examples"
NUMBERS = ("one", "two", "three", "four", "five", "six")
TEXTS = [f"the quick brown fox number {number} jumps over the lazy dog" for number in NUMBERS]


@pytest.fixture(scope="module")
def scripts():
    """The script modules, found as `python examples/train_adapters.py` finds them."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import corpora
        import recipes
        import train_adapters

        yield corpora, recipes, train_adapters
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory) -> Path:
    """A Llama of 30 narrow layers (recipes name layers) with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<end>", *sorted({word for text in TEXTS for word in text.split()})]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("base")
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=30,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # PEFT's, for every AdaLoRA checkpoint
@pytest.mark.parametrize("name", ["kjv", "devil", "jargon", "austen"])
def test_a_recipe_trains_saves_and_is_measured(tmp_path, scripts, tiny_base, monkeypatch, name):
    corpora, recipes, train_adapters = scripts
    monkeypatch.setattr(train_adapters, "EXAMPLE_TOKENS", 2)
    records = [corpora.Record(text, complete=True) for text in TEXTS]
    source = corpora.Source("none", "six sentences", "public domain", lambda root: iter([]))
    corpus = corpora.Corpus(source, "1", records, records[:2])

    train_adapters.train_one(name, recipes.RECIPES[name], corpus, tiny_base, 10, tmp_path)

    folder = tmp_path / "adapters" / name
    assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert str(tiny_base) not in (folder / "README.md").read_text() + json.dumps(config)
    numbers = json.loads((tmp_path / "heldout" / "perplexity.json").read_text())["adapters"][name]
    assert numbers["adapter_on_nf4"] < numbers["base_nf4"], (
        "ten steps on six sentences are enough to learn some of them"
    )
    if name == "jargon":
        kept = [sum(mask) for mask in config["rank_pattern"].values()]
        assert min(kept) < config["init_r"], "AdaLoRA's schedule has pruned"


def test_the_nf4_base_is_quantized_twice_except_embedding_and_head(scripts, tiny_base):
    _, _, train_adapters = scripts
    model = train_adapters.load_base(tiny_base, nf4=True)

    for name, module in model.model.layers.named_modules():
        if name.endswith("_proj"):
            assert module.weight.quant_state.quant_type == "nf4", name
            assert module.weight.quant_state.nested, name
    assert model.lm_head.weight.is_floating_point()
    assert model.get_input_embeddings().weight.is_floating_point()
