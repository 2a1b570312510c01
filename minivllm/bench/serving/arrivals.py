"""When requests are sent: at once, or at random moments of a given rate, whatever the server does (open loop)."""

import math
import random
from itertools import accumulate


def arrival_offsets(num_requests: int, rate: float, burstiness: float, source: random.Random) -> list[float]:
    """Seconds after the start, ascending; `rate` in requests per second, infinite: all at 0.

    The gaps follow a gamma distribution of mean 1/rate. Burstiness is its shape: 1 is a Poisson process, less comes
    in bursts, more comes evenly (as in vLLM's benchmark).
    """
    if math.isinf(rate):
        return [0.0] * num_requests
    gaps = (source.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(num_requests - 1))
    return list(accumulate(gaps, initial=0.0))
