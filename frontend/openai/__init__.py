"""OpenAI's API over the shared generation path: schemas, and how its responses are written."""
