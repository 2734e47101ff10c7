"""GGUF files of language models: what their tensors and settings are called, and their import as MLX directories.

`names.py` is the table of architectures that reading and writing share. `header.py` and `config.py` check a file,
`convert.py` writes the model directory and `tokenizer.py` its tokenizer.
"""

from mlx_lora.models.gguf.convert import import_gguf

__all__ = ["import_gguf"]
