"""Inference with a model: generated answers (`generate`), log-likelihoods of continuations (`scoring`), rewards."""
