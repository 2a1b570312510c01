"""GET /v1/models and /v1/models/{id}: the one model that is served."""

import time
from typing import Any

from frontend.engine_client import EngineClient
from frontend.generation import check_model, served_name
from minivllm.config import FrontendConfig


class Models:
    """What is said of the model. `max_model_len` is null while it is loading."""

    def __init__(self, config: FrontendConfig, engine: EngineClient) -> None:
        self._config = config
        self._engine = engine
        self._created = int(time.time())

    def all(self) -> dict[str, Any]:
        """The list of models."""
        return {"object": "list", "data": [self.one(served_name(self._config))]}

    def one(self, name: str) -> dict[str, Any]:
        """The model of that name. Raises `UnknownModelError`."""
        check_model(name, self._config)
        facts = self._engine.link.facts
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "minivllm",
            "root": self._config.model,
            "parent": None,
            "max_model_len": facts.max_model_len if facts else None,
        }
