"""Smaller and faster models from trained ones: quantised, binarised, pruned, factorised.

Procedures are interceptions of the modules that every model is made of, and phases over its state:
there are no second models. `intercepted` says how a model is changed, `quantizers` and
`straight_through` what values become, `operands` where; searches and surgery build on these.
`binary` and `lsq` are weights that train while they have few bits. `compressor` makes
papers' procedures links of a chain, `packed` is how their weights are stored.
"""
