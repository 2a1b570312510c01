"""Tiny models for the engine's unit tests."""

from tests.support.fixtures import one_thread, tiny_models

__all__ = ["one_thread", "tiny_models"]
