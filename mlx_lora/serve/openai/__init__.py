"""What requests of OpenAI's API mean: pure translation, without HTTP and without threads."""

from mlx_lora.serve.openai.asked import Asked
from mlx_lora.serve.openai.errors import ApiError, api_error
from mlx_lora.serve.openai.prepare import prepare

__all__ = ["ApiError", "Asked", "api_error", "prepare"]
