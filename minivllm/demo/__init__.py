"""Shows continuous batching at work in a terminal."""
