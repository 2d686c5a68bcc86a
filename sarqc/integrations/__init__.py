"""transformers' `from_pretrained` on packed checkpoints."""
