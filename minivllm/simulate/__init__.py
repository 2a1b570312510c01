"""The engine without a model: the very EngineCore and Scheduler on a device that only knows how long passes take."""
