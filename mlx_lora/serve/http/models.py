"""/v1/models: the base and the adapters that fit it. Their names are all that a request may name."""

from __future__ import annotations

import time
from typing import Any

from mlx_lora.errors import AdapterError
from mlx_lora.models.context import context_length
from mlx_lora.serve.openai.errors import ApiError
from mlx_lora.serve.service import Service


class Models:
    """What is listed of a service. Reads the store's files."""

    def __init__(self, service: Service):
        self.service = service
        self._started = int(time.time())

    def list(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._base(), *map(self._adapter, self.service.names())]}

    def one(self, name: str) -> dict[str, Any]:
        """Raises ApiError 404 for a name that `list` doesn't have."""
        return self._base() if name == self.service.base else self._adapter(self.known(name))

    def known(self, name: Any) -> str:
        """The name of an adapter, or ApiError 404."""
        if not isinstance(name, str) or name not in self.service.names():
            shown = repr(name)[:80]
            raise ApiError(404, "model_not_found", f"no model {shown}; /v1/models lists those there are", "model")
        return name

    def _base(self) -> dict[str, Any]:
        return self._entry(self.service.base, None, self._started)

    def _adapter(self, name: str) -> dict[str, Any]:
        try:
            made = int(self.service.find(name).stat().st_mtime)
        except (AdapterError, OSError):  # it has just been removed
            made = self._started
        return self._entry(name, self.service.base, made)

    def _entry(self, name: str, parent: str | None, created: int) -> dict[str, Any]:
        return {
            "id": name, "object": "model", "created": created, "owned_by": "mlx-lora", "root": name, "parent": parent,
            "max_model_len": context_length(self.service.config),
        }  # fmt: skip
