"""Model cards of the demo adapters."""

from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from corpora import Corpus
from lorikeet.server.base.demo import BASE_NAME
from peft import AdaLoraConfig, LoraConfig, PeftConfig
from recipes import Recipe


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured for one adapter.

    Attributes:
        sixteen_bit: held-out perplexity of the 16-bit base.
        before: held-out perplexity of the NF4 base.
        after: held-out perplexity of the NF4 base with the saved adapter, unmerged.
        tokens: tokens predicted for each perplexity.
        records: held-out records.
        steps: optimizer steps.
        seconds: training time on the clock.
        cpu_seconds: training time on the processor, all threads.
        final_loss: mean training loss of the last ten steps.
        answers: continuations of the recipe's prompt on the NF4 base, by who gave them.
    """

    sixteen_bit: float
    before: float
    after: float
    tokens: int
    records: int
    steps: int
    seconds: float
    cpu_seconds: float
    final_loss: float
    answers: dict[str, str]


def write_card(
    directory: Path, recipe: Recipe, corpus: Corpus, measured: Measurement, *, batch: int, length: int, seed: int
) -> None:
    """Writes README.md into the adapter's directory, which already holds its configuration."""
    config = PeftConfig.from_pretrained(str(directory))
    libraries = ", ".join(
        f"{package} {version(package)}" for package in ("torch", "transformers", "peft", "bitsandbytes")
    )
    ratio = "" if recipe.loraplus_ratio is None else f", lora_B's {recipe.loraplus_ratio:g} times as high (LoRA+)"
    answers = "\n\n".join(f"{who}:\n\n```text\n{recipe.prompt}{text}\n```" for who, text in measured.answers.items())
    source = corpus.source
    (directory / "README.md").write_text(
        f"""---
base_model: {BASE_NAME}
library_name: peft
pipeline_tag: text-generation
license: apache-2.0
tags: [{config.peft_type.value.lower()}, demo]
---

# {directory.name}

A demo adapter for Lorikeet: {source.title}, learned with {recipe.method}.

## Data

{source.title[0].upper()}{source.title[1:]}.
Licence: {source.licence}.
Source: Debian's package `{source.package}` {corpus.version}.
{len(corpus.train):,} records to train on; {measured.records} held out, chosen by a hash of chapter or headword
(`examples/heldout/{directory.name}.txt`).
`calibration.txt` is some of the text that was trained on; `lorikeet merge` calibrates 4-bit models with it.

## Method

{recipe.method} with PEFT. {recipe.note}

| | |
|---|---|
| base while training | {BASE_NAME}, {"NF4 with double quantization" if recipe.base_in_nf4 else "16 bit"} |
| targets | {targets(config)} |
| rank | {rank(config)} |
| alpha | {alpha(config)} |
| optimizer | AdamW, learning rate {recipe.learning_rate:g}{ratio}, 10 % warm-up, then cosine |
| steps | {measured.steps}, batch {batch}, up to {length} tokens a sequence |
| seed | {seed} |
| time | {time_taken(measured)} |
| last training loss | {measured.final_loss:.3f} |
| saved as | float16 |

## Perplexity on held-out text

{measured.tokens:,} tokens, each record on its own, measured by `examples/train_adapters.py`.

| 16-bit base | NF4 base | NF4 base with this adapter, unmerged |
|---|---|---|
| {measured.sixteen_bit:.2f} | {measured.before:.2f} | **{measured.after:.2f}** |

## Example

On the NF4 base, prompt `{recipe.prompt}`; greedy, and once sampled (temperature 0.8, top-p 0.95, seed {seed}).

{answers}

## Limits

A style demo, minutes of training on a model of 135 million parameters. It imitates the manner and the prejudices of its
text and knows no facts to rely on.

Made {date.today().isoformat()} with {libraries}.
""",
        encoding="utf-8",
    )


def time_taken(measured: Measurement) -> str:
    """Processor time as if two cores had nothing else to do, and the clock's."""
    work, clock = measured.cpu_seconds / 120, measured.seconds / 60
    return f"{work:.1f} minutes of 2 CPU cores (AVX2, float32 arithmetic); {clock:.1f} on the clock of a shared machine"


def targets(config: LoraConfig) -> str:
    """The target modules, and the layers if not all."""
    text = ", ".join(f"`{name}`" for name in sorted(config.target_modules))
    layers = config.layers_to_transform
    return f"{text}; layers {layers[0]} to {layers[-1]}" if layers else text


def rank(config: LoraConfig) -> str:
    """The rank, its exceptions, or what AdaLoRA's pruning left."""
    if isinstance(config, AdaLoraConfig):
        kept = [sum(mask) for mask in config.rank_pattern.values()]
        average = sum(kept) / len(kept)
        return f"{config.init_r} at the start; {min(kept)} to {max(kept)} kept, {average:.1f} on average"
    exceptions = "".join(f"; {value} for `{key}`" for key, value in config.rank_pattern.items())
    return f"{config.r}{exceptions}"


def alpha(config: LoraConfig) -> str:
    """The alpha, its exceptions, and how it is scaled."""
    exceptions = "".join(f"; {value} for `{key}`" for key, value in config.alpha_pattern.items())
    return f"{config.lora_alpha}{exceptions}{', over the root of the rank (rsLoRA)' if config.use_rslora else ''}"
