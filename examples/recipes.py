"""What each demo adapter is: text, method and hyperparameters.

They differ in rank, targets and method on purpose, so that a batch of all four is as mixed as a batch can be.
"""

from collections.abc import Callable
from dataclasses import dataclass

from peft import AdaLoraConfig, LoraConfig


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one adapter is trained.

    Attributes:
        method: name for people, as the card gives it.
        base_in_nf4: train on the NF4 base (QLoRA) instead of the 16-bit one.
        config: makes the PEFT configuration for a number of steps.
        learning_rate: peak; linear warm-up over a tenth of the steps, then a cosine to zero.
        loraplus_ratio: LoRA+'s ratio of lora_B's to lora_A's learning rate; None for one rate.
        steps: optimizer steps.
        prompt: the example in the card and in the README.
        note: a sentence for the card about the configuration.
    """

    method: str
    base_in_nf4: bool
    config: Callable[[int], LoraConfig]
    learning_rate: float
    loraplus_ratio: float | None
    steps: int
    prompt: str
    note: str


def kjv_config(steps: int) -> LoraConfig:
    """QLoRA adapts every linear of the decoder."""
    return LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=12, target_modules="all-linear")


def devil_config(steps: int) -> LoraConfig:
    """The classic choice: query and value."""
    return LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])


def jargon_config(steps: int) -> AdaLoraConfig:
    """AdaLoRA starts at rank 6 and prunes to 4 on average, from a fifth to three fifths of the steps."""
    return AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=6,
        target_r=4,
        lora_alpha=24,
        target_modules=["v_proj", "o_proj", "up_proj", "down_proj"],
        tinit=steps // 5,
        tfinal=2 * steps // 5,
        deltaT=4,
        total_step=steps,
        orth_reg_weight=0.1,
    )


def austen_config(steps: int) -> LoraConfig:
    """Rank-stabilized scaling (alpha over the root of the rank), upper two thirds of the layers, mixed ranks."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        use_rslora=True,
        target_modules=["o_proj", "gate_proj", "down_proj"],
        layers_to_transform=list(range(10, 30)),
        rank_pattern={"down_proj": 10},
        alpha_pattern={"down_proj": 20},
    )


RECIPES = {
    "kjv": Recipe(
        method="QLoRA",
        base_in_nf4=True,
        config=kjv_config,
        learning_rate=2e-3,
        loraplus_ratio=None,
        steps=80,
        prompt="In the beginning",
        note="Trained on the NF4 base with double quantization (on CUDA with bitsandbytes' paged AdamW). All linears.",
    ),
    "devil": Recipe(
        method="LoRA",
        base_in_nf4=False,
        config=devil_config,
        learning_rate=2e-3,
        loraplus_ratio=None,
        steps=100,
        prompt="Define COMPUTER:",
        note="Trained on the 16-bit base, on query and value only.",
    ),
    "jargon": Recipe(
        method="AdaLoRA",
        base_in_nf4=False,
        config=jargon_config,
        learning_rate=4e-3,
        loraplus_ratio=None,
        steps=120,
        prompt="Jargon entry for cloud:",
        note="Trained on the 16-bit base. Ranks are pruned by importance while training, so they differ by module.",
    ),
    "austen": Recipe(
        method="LoRA+ (with rsLoRA)",
        base_in_nf4=False,
        config=austen_config,
        learning_rate=3e-4,
        loraplus_ratio=16.0,
        steps=100,
        prompt="The engineer opened the door and",
        note="Trained on the 16-bit base; layers 10 to 29 only, with another rank on the down projection.",
    ),
}
