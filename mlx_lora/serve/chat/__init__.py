"""The chat in a terminal, on the scheduler: `chat.py` answers, `commands.py` is what begins with a slash."""

from mlx_lora.serve.chat.chat import Chat

__all__ = ["Chat"]
