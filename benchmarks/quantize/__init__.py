"""A whole quantization run on a model that was never saved: random weights in the shape of a real one, drawn by block.

`shapes` has the models, `source` draws their tensors by name, `stopwatch` splits the time by operation, `command` runs
it and writes one record. Timing needs shapes and traffic, not sense: the error that such a run reports means nothing.
"""
