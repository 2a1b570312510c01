"""The load generator: measures any OpenAI-style server from outside, as its clients see it."""
