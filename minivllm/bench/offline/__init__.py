"""Measures the engine core in-process: no server, no tokenizer, random weights if need be."""
