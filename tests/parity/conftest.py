"""Tiny models of many architectures, shared by all parity tests."""

from tests.support.fixtures import one_thread, tiny_models

__all__ = ["one_thread", "tiny_models"]
