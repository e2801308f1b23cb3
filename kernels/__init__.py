"""Tensor operators: a plain-torch reference and fast implementations, one family a file."""
