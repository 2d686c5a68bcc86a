"""The method: tensors in, tensors out. No files, no models, no progress bars.

gram          calibration statistics: sums that add over micro-batches, folds and ranks
hessian       Gram + lambda * saliency + damping -> the matrix that is factored, and its factor
lambda_search which lambda: held-out validation, pooled over depth
scale_search  scales and zero-points with the least output error
rtn           round to nearest                      gptq  columns in order with error feedback, then coordinate descent
awq           channel scales
error_correction  a target that makes up for the error of earlier layers
bit_allocation    loss per bit-width, and the knapsack
layer         one layer: solver, fallback, report   weight  the quantized weight that all rooms exchange
"""
