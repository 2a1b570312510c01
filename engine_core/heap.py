"""Memory that was freed goes back to the system: glibc keeps what lies between blocks that are still used."""

import ctypes


def trim_heap() -> None:
    """Give free memory of this process back. Does nothing where the C library has no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
