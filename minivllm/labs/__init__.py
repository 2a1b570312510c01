"""Experiments that a reader runs: one idea of the engine each, as a number, a picture and the lines that do it."""
