"""The stages, one package each. They communicate through the run folder and never import one another.

They live under `stages` so that names such as `tunesmith.train` are functions, not packages.
"""
