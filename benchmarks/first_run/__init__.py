"""A first run on a GPU, in minutes and without luck: `python -m benchmarks.first_run`.

`command` runs the parts in order of importance, each in a process of its own, and writes down each as it ends. `cache`
makes, without a GPU, what the GPU's machine would else compile: `make gpu-cache`. `fake_driver` is the driver that it
compiles with, and `portable` gives a cache of one Python to another.
"""
