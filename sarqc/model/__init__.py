"""One transformers model: the only room that loads, builds and runs them.

architecture   a configuration's class and its blocks      checks         may a model be built from this config.json
lazy_model     a model without its weights, filled and emptied block by block
config_only    a model of which only config.json is here   in_memory      a model in memory, as its checkpoint
build          a model that runs, dense or packed          packed_linear  modules whose weights stay packed
weight_map     checkpoint tensor -> part of a parameter    source         where tensors come from, as a protocol
expert_names   names for single experts' matrices          other_forms    matrices that are not stored as a Linear's
transposed     modules that multiply from the other side   tied           a head taken apart from the embedding
moe            mixtures of experts                         undeclared_experts  those of older classes
candidates     every matrix, and why one is left           layers         what will be quantized
usage          what each weight is used for                trial          a module tried on numbers
sites          which Linears read the same tensor          smoothing      where channel scales can go
residual       which layer writes to the hidden states
hub            a model's name -> its folder                tokenizer      whether its tokens are the model's
text_files     text or rows of a file                      dataset        text or data set -> windows of tokens
calibration_data  data in a caller's forms -> windows      generate       tokens one at a time, with a cache
perplexity     with its protocol                           lm_eval        lm-eval's tasks, and a cloze of our own
"""
