"""The device process: scheduler, KV cache, model runner, and the sockets around them."""
