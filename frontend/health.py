"""What the probes are told: is anything broken (/health), and can a request be served now (/ready)."""

from frontend.engine_client import EngineClient
from minivllm.errors import EngineDeadError, NotReadyError, OverloadedError

Answer = tuple[int, dict[str, str]]


def health(engine: EngineClient) -> Answer:
    """Status and body: 503 while nothing moves because the engine core is gone; loading at first is no failure."""
    reason = engine.link.gone_reason
    return (200, {"status": "ok"}) if reason is None else (503, {"status": "engine_restarting", "message": reason})


def readiness(engine: EngineClient) -> Answer:
    """Status and body: what would happen to a request that came now, and why."""
    try:
        engine.check_admission()
    except EngineDeadError as error:
        return 503, {"status": "engine_restarting", "message": str(error)}
    except NotReadyError as error:
        return 503, {"status": "draining" if engine.draining else "loading", "message": str(error)}
    except OverloadedError as error:
        return 503, {"status": "queue_full", "message": str(error)}
    return 200, {"status": "ready"}
