"""The planner, a standalone library: memory, time and cost of training; only `tracing` and `calibrate` import torch."""
