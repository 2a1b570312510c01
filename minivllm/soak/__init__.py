"""Clients that know every answer beforehand, and someone who kills the server under them: scripts/soak, tests/chaos."""
