"""Perplexity tables, and the texts, tokens and models they are made with."""
