"""The planner, a library of its own: bytes, seconds and money of a training, without torch but for `tracing`."""
