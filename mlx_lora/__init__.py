"""mlx-lora: LoRA fine-tuning on this machine, with MLX. See README.md for the commands.

Importing this package imports neither MLX nor mlx_lm and changes nothing in the process.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
