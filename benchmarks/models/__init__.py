"""Which architectures `sarqc quantize` takes: tiny random models of all that transformers
builds, quantized and reloaded.

`python -m benchmarks.models run --out FOLDER` builds each row, quantizes it, loads it in transformers with and without
sarqc, and compares the logits with those of a dense model that this package unpacks itself.
"""
