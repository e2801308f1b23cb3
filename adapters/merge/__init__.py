"""Merging adapters into a base: what the merged tensors are, and how they get to disk. Imports no transformers."""
