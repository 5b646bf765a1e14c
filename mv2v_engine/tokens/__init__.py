"""Tokens: the plan of a sequence (pure Python), its positions, and the tokenizers that fill it."""
