"""The HTTP process: validates, tokenizes, admits, streams. Imports neither torch nor transformers."""
