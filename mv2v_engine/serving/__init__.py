"""The service: durable sessions behind HTTP, one worker process that owns the engine."""
