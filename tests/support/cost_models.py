"""A cost model with round numbers."""

from typing import Any

from minivllm.simulate.cost_model import CostModel, Curve


def cost_model(**changes: Any) -> CostModel:
    """Ten milliseconds a decode step of one, one millisecond a prefill token."""
    values: dict[str, Any] = {
        "description": "test",
        "decode": Curve((1, 11), (0.010, 0.020)),
        "decode_per_context_token": 0.0,
        "prefill": Curve((10, 20), (0.010, 0.020)),
        "prefill_per_pair": 0.0,
        "prefill_per_row": 0.0,
        "num_blocks": 64,
        "block_size": 4,
        "max_model_len": 200,
        "max_num_batched_tokens": 32,
    }
    return CostModel(**(values | changes))
