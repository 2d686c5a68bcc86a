"""The method: tensors in, tensors out. No files, no models, no progress bars.

statistics  what is remembered of a site's inputs: Grams that add, merge and fold
objective   Gram + lambda * saliency -> the matrix that is factored, and its factor
strength    which lambda: what held-out text says, pooled over depth
held_out    solve some rows on one stretch of text, judge them on another
pooling     what an expert that saw few tokens borrows from the others
carry       a target for the layer of a block that makes up for earlier errors
channel_scale  inputs rescaled so that the ones that matter get finer steps
grid        spans searched for the least output error
order       in which order columns are taken
solve       a weight and its statistics -> codes, scales, zeros and a report
descent     codes and scales that a solver found, improved in turn
weight      the quantized weight all rooms exchange
parts       a tensor that is handed on piece by piece
"""
