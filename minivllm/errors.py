"""Every error this project raises on purpose, so that callers can tell whose fault it is.

MiniVLLMError
├── StartupError        the server cannot start; the message is the one line the user sees (exit code 1)
│   └── ModelError      … because of the model: unsupported, too large, incomplete
├── InvalidRequestError one request is at fault (HTTP 400); `param` names the field
│   ├── DuplicateRequestError … because its id is in use (HTTP 409)
│   └── UnknownModelError … because it names a model that is not served (HTTP 404)
├── GenerationError     the engine gave up on one request that was not at fault (HTTP 500)
│   └── EngineKilledError … because the engine core died of it, more than once
├── OverloadedError     too much work at once (HTTP 429/503); `retry_after` in seconds
├── NotReadyError       still loading, or shutting down (HTTP 503); `retry_after` in seconds
├── EngineDeadError     the engine core is gone or does not answer (HTTP 503)
└── ProtocolError       a message on the wire could not be understood
"""


class MiniVLLMError(Exception):
    """Root of the tree; never raised itself."""


class StartupError(MiniVLLMError):
    """The server cannot start. `str(error)` is one line that says why and what to change."""


class ModelError(StartupError):
    """The model cannot run here: unsupported architecture, too large, or missing files."""


class InvalidRequestError(MiniVLLMError, ValueError):
    """One request is at fault. `param` is the name of the offending field, where there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class DuplicateRequestError(InvalidRequestError):
    """A live request already has this id."""


class UnknownModelError(InvalidRequestError):
    """The model that the request names is not served here."""


class GenerationError(MiniVLLMError):
    """The engine gave up on a request that was not at fault itself."""


class EngineKilledError(GenerationError):
    """The engine core died again and again while it worked on this request."""


class OverloadedError(MiniVLLMError):
    """The bounded queue is full. Retry after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotReadyError(MiniVLLMError):
    """The server is still loading, or shutting down. Retry after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineDeadError(MiniVLLMError):
    """The engine core is gone, or has not been heard of within its lease."""


class ProtocolError(MiniVLLMError):
    """A frame is not a message of this protocol and version."""
