"""The stages, one package each. They meet in the run folder and never import one another.

They stand below `stages` so that `tunesmith.train` and its like are functions and not packages.
"""
