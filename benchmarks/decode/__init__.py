"""One decode step of a whole model: tokens per second with packed weights beside bf16, against the bytes it must read.

`model` makes the models (shapes of real ones, weights drawn block by block, no checkpoint) and counts what a step must
do; `command` is `python -m benchmarks.run decode`.
"""
