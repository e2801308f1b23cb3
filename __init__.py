"""Lorikeet: one NF4 base model, many unmerged LoRA adapters, one batch."""

__version__ = "0.1.0"
