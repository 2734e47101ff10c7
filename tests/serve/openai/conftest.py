"""A started service on a tiny base whose template shows tools and thinks when asked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mlx_lora.serve.service import Service, open_service
from tests.conftest import write_model, write_tokenizer
from tests.serve.openai.drive import TOOL_TEMPLATE


@pytest.fixture(scope="session")
def tooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    path = write_model(tmp_path_factory.mktemp("models") / "tooled", max_position_embeddings=2048)
    write_tokenizer(path, template=TOOL_TEMPLATE)
    with open_service(str(path)) as service:
        yield service
