"""The Llama family, as people have it today: SmolLM, SmolLM2, TinyLlama, Llama 2 (model.py)."""
