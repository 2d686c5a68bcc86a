"""A first run on a GPU, in minutes and without luck: `python -m benchmarks.first_run`.

`command` runs the parts in order of importance, each in a process of its own, and writes down each as it ends; `whole`
is one of them. `rehearsal` is a GPU that is not there, for all of them. `cache` makes with it what the GPU's machine
would else compile (`make gpu-cache`), and `portable` gives a cache of one Python to another.
"""
