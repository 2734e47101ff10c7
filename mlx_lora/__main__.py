"""`python -m mlx_lora` is `mlx-lora`."""

from mlx_lora.cli import main

if __name__ == "__main__":
    main()
