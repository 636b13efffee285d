"""Worked example: a small byte-level language model whose attention can be replaced from outside."""
