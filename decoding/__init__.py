"""Decoding a batch of prompts: its state, constraints on the next token, beam search."""
