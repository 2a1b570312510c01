"""Mini-vLLM: an LLM inference engine small enough to read whole. `LLM` and `MiniVLLMEngine` load torch on first use."""

from typing import TYPE_CHECKING, Any

from minivllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from minivllm.llm import LLM
    from minivllm.step_engine import MiniVLLMEngine

__all__ = ["LLM", "MiniVLLMEngine", "SamplingParams"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from minivllm.llm import LLM

        return LLM
    if name == "MiniVLLMEngine":
        from minivllm.step_engine import MiniVLLMEngine

        return MiniVLLMEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
