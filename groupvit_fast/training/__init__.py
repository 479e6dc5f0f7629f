"""Training: losses, optimiser, checkpoints, metrics, recipes and the loop.

`recipes` says what can be chosen, `options` reads it from the command line and YAML, `trainer` is the loop.
"""
