"""One transformers model: the only room that loads, builds and runs them.

lazy_model     a model without its weights, filled and emptied block by block
weight_map     checkpoint tensor -> part of a parameter    source         where tensors come from, as a protocol
layers         what will be quantized                      sites          which Linears read the same tensor
moe            mixtures of experts                         smoothing      where channel scales can go
residual       which layer writes to the hidden states     config_only    a model of which only config.json is here
checks         may a model be built from this config.json  hub            a model's name -> its folder
dataset        text or data set -> windows of tokens       tokenizer      whether its tokens are the model's
packed_linear  modules whose weights stay packed           build          a model that runs, dense or packed
generate       tokens one at a time, with a cache          perplexity     with its protocol
lm_eval        lm-eval's tasks, and a cloze of our own
"""
