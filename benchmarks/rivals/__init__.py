"""Other people's ways to compute what we compute, each behind the smallest call that is fair to it.

`gptq_eager` and `llmcompressor_fused` solve columns, `packed_matmul` multiplies by packed weights;
`llmcompressor_oneshot` is a whole run, started by `benchmarks.speed` in an environment of its own.
"""
