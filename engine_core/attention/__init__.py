"""Attention over the paged KV pool, plugged into Hugging Face models through their attention registry."""
