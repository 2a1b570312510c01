"""File descriptors for as many connections as are allowed: the usual soft limit of 1,024 is reached much earlier."""

import logging
import resource

logger = logging.getLogger(__name__)

RESERVED = 128  # for everything that is not a client's connection


def connections_that_fit(wanted: int) -> int:
    """`wanted`, or as many as the system has descriptors for. Raises this process's soft limit to what is needed."""
    needed = wanted + RESERVED
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(soft, needed if hard == resource.RLIM_INFINITY else min(needed, hard))
    if soft not in {limit, resource.RLIM_INFINITY}:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if soft == resource.RLIM_INFINITY or limit >= needed:
        return wanted
    fit = max(1, limit - RESERVED)
    logger.warning("%d file descriptors allow %d connections instead of %d (--limit-concurrency)", limit, fit, wanted)
    return fit
