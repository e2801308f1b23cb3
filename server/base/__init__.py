"""The NF4 base model: sources, quantizing while loading, stacked linears, families."""
