"""What the compilers make of every kernel, for cards that are not here: registers, spills, shared memory, instructions.

    python -m benchmarks.aot [--also 3.6.0] [--match TEXT] [--arch 90] [--check-only]

`jobs` runs `launches` of each operation on a GPU that is not there and notes what would be compiled, `compiler` builds
one job with Triton, `sass` reads the machine code,
`csrc` does the same for CUDA C++ with nvcc, `table` writes `benchmarks/results/aot-*.md`. The tables are committed, so
a change of kernels or of a compiler shows as a diff. Compiling needs no GPU; nothing here says how fast a kernel is.
"""
