"""What a model says: answers (`generate`), log-likelihoods of continuations (`scoring`), rewards."""
