"""Trains the four demo adapters with PEFT, one for each method: `python examples/train_adapters.py`.

Takes a few minutes each on two CPU cores; uses CUDA when there is one. For each adapter it writes to `--out`
`adapters/NAME/` (what PEFT saves, 16-bit, a model card and some of the training text), `heldout/NAME.txt` (records
separated by blank lines) and this adapter's numbers in `heldout/perplexity.json`. Texts come from Debian packages (see
corpora.py).
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes
import torch
from cards import Measurement, write_card
from corpora import Corpus, Record, calibration_text, load_corpus
from evaluation import IGNORED, continuation, perplexity
from lorikeet.adapters.carried_text import CARRIED_FILE
from lorikeet.server.base.demo import BASE_NAME, prepare_demo_base
from peft import AdaLoraModel, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.optimizers import create_loraplus_optimizer
from recipes import RECIPES, Recipe
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

SEQUENCE_TOKENS = 128
BATCH = 4
SEED = 20261122
MAX_BYTES = 2_000_000
EXAMPLE_TOKENS = 48


def main() -> None:
    """Trains what `--only` names, or all four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", choices=sorted(RECIPES), action="append", help="train this one (repeatable)")
    parser.add_argument("--steps", type=int, help="optimizer steps instead of the recipe's")
    parser.add_argument("--model", type=Path, help="16-bit base model directory; default: the demo base")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="directory for adapters/ and heldout/")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache/lorikeet", help="base and texts")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers_logging.disable_progress_bar()
    base = arguments.model or prepare_demo_base(arguments.cache_dir)
    for name in arguments.only or list(RECIPES):
        corpus = load_corpus(name, arguments.cache_dir / "texts")
        train_one(name, RECIPES[name], corpus, base, arguments.steps or RECIPES[name].steps, arguments.out)


def train_one(name: str, recipe: Recipe, corpus: Corpus, base: Path, steps: int, out: Path) -> None:
    """Trains, saves, measures on held-out text and writes the card of one adapter."""
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load_base(base, nf4=recipe.base_in_nf4)
    if recipe.base_in_nf4:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, recipe.config(steps))
    model.print_trainable_parameters()
    started, cpu_started = time.monotonic(), time.process_time()
    final_loss = optimize(name, model, recipe, encode(corpus.train, tokenizer), steps)
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu_started
    directory = out / "adapters" / name
    save_adapter(model, directory)
    (directory / CARRIED_FILE).write_text(calibration_text(corpus), encoding="utf-8")
    del model

    heldout = [record.text for record in corpus.heldout]
    (out / "heldout").mkdir(parents=True, exist_ok=True)
    (out / "heldout" / f"{name}.txt").write_text("\n\n".join(heldout) + "\n", encoding="utf-8")
    sixteen_bit, tokens = perplexity(load_base(base, nf4=False), tokenizer, heldout)
    # The saved folder is measured, not the model in memory: 16-bit rounding and AdaLoRA's pruning are part of it.
    nf4 = load_base(base, nf4=True)
    before, _ = perplexity(nf4, tokenizer, heldout)
    answers = {"Base": continuation(nf4, tokenizer, recipe.prompt, EXAMPLE_TOKENS)}
    adapted = PeftModel.from_pretrained(nf4, str(directory))
    after, _ = perplexity(adapted, tokenizer, heldout)
    answers["Adapter"] = continuation(adapted, tokenizer, recipe.prompt, EXAMPLE_TOKENS)
    answers["Adapter, sampled"] = continuation(adapted, tokenizer, recipe.prompt, EXAMPLE_TOKENS, seed=SEED)
    measured = Measurement(
        sixteen_bit, before, after, tokens, len(heldout), steps, seconds, cpu_seconds, final_loss, answers
    )
    record_perplexity(out / "heldout" / "perplexity.json", name, measured)
    write_card(directory, recipe, corpus, measured, batch=BATCH, length=SEQUENCE_TOKENS, seed=SEED)
    print(f"{name}: {measured}")


def load_base(base: Path, *, nf4: bool) -> PreTrainedModel:
    """The 16-bit base, or its NF4 form with double quantization.

    The 16-bit weights are held in float32 on a CPU, where bf16 arithmetic is slow or absent: the values are the same.
    """
    compute = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantization = None
    if nf4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=compute, device_map=device, quantization_config=quantization
    )


def encode(records: list[Record], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each record, cut to the sequence length; a text that ends here ends with the end token."""
    encoded = tokenizer([record.text for record in records], add_special_tokens=False).input_ids
    ends = [[tokenizer.eos_token_id] if record.complete else [] for record in records]
    return [(ids + end)[:SEQUENCE_TOKENS] for ids, end in zip(encoded, ends, strict=True)]


def batches(sequences: list[list[int]], device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Endless shuffled batches, padded on the right to their longest sequence."""
    generator = torch.Generator().manual_seed(SEED)
    while True:
        order = torch.randperm(len(sequences), generator=generator).tolist()
        for start in range(0, len(order) - BATCH + 1, BATCH):
            rows = [sequences[index] for index in order[start : start + BATCH]]
            width = max(len(row) for row in rows)
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
            yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def make_optimizer(model: PeftModel, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; paged (its state moves to host memory under pressure) for QLoRA where the device has it, i.e. CUDA."""
    if recipe.loraplus_ratio is not None:
        return create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=recipe.learning_rate, loraplus_lr_ratio=recipe.loraplus_ratio, weight_decay=0.0
        )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if recipe.base_in_nf4 and model.device.type == "cuda":
        return bitsandbytes.optim.PagedAdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    return torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)


def optimize(name: str, model: PeftModel, recipe: Recipe, sequences: list[list[int]], steps: int) -> float:
    """Runs the training loop; returns the mean loss of the last ten steps."""
    optimizer = make_optimizer(model, recipe)
    warmup = max(1, steps // 10)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    source = batches(sequences, model.device)
    losses: list[float] = []
    model.train()
    progress = tqdm(range(steps), desc=name, unit="step")
    for step in progress:
        loss = model(**next(source)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        schedule.step()
        if isinstance(model.base_model, AdaLoraModel):
            # Reads the gradients for its importance scores, so it comes before they are cleared.
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        progress.set_postfix(loss=f"{sum(losses[-10:]) / len(losses[-10:]):.3f}")
    return sum(losses[-10:]) / len(losses[-10:])


def save_adapter(model: PeftModel, directory: Path) -> None:
    """Saves in fp16 under the base's public name, so that no path of this machine gets into the folder."""
    model.save_pretrained(directory)
    weights = directory / "adapter_model.safetensors"
    save_file({key: value.half().contiguous() for key, value in load_file(weights).items()}, weights, {"format": "pt"})
    if weights.stat().st_size > MAX_BYTES:
        raise SystemExit(f"{weights} has {weights.stat().st_size} bytes; the limit is {MAX_BYTES}. Lower the rank.")
    config_file = directory / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config["base_model_name_or_path"] = BASE_NAME
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def record_perplexity(file: Path, name: str, measured: Measurement) -> None:
    """Puts one adapter's numbers into the file that the serving test reads."""
    content = json.loads(file.read_text()) if file.is_file() else {"adapters": {}}
    content["how"] = (
        "transformers and PEFT on a CPU in float32; NF4 with double quantization by bitsandbytes; each record of the "
        "file (separated by blank lines) on its own, no special tokens, all tokens but its first"
    )
    content["adapters"][name] = {
        "tokens": measured.tokens,
        "records": measured.records,
        "base_16bit": round(measured.sixteen_bit, 2),
        "base_nf4": round(measured.before, 2),
        "adapter_on_nf4": round(measured.after, 2),
    }
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
