"""Measures the frontend process alone: real sockets on both sides, and no model behind it."""
