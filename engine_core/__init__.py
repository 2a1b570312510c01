"""The device process: scheduler, KV cache, model runner, and the sockets around them.

What is compiled for a GPU is kept in our cache directory. Said here, before anything else: torch settles on a directory
of its own as soon as its compiler is imported, which transformers does.
"""

import os

from minivllm.cache import cache_dir

os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))
os.environ.setdefault("TRITON_CACHE_DIR", str(cache_dir() / "triton"))
