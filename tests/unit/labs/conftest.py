"""Tiny models for the labs."""

from tests.support.fixtures import one_thread, tiny_models

__all__ = ["one_thread", "tiny_models"]
