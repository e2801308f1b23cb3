"""Adapters: checkpoint formats, validation, lifecycle, device memory and the LoRA layers."""
