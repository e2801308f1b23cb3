"""The step loop: scheduling, paged KV, sampling. One thread owns the model."""
