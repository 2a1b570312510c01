"""Stands in for the engine core and the frontends in the tests of the launcher."""
