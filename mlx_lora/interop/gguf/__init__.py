"""GGUF files for llama.cpp: an adapter beside its base, or base and adapter merged."""
