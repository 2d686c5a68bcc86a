"""The model room: the only one that knows transformers.

A model without its weights
skeleton     filled and emptied block by block            outline    of which only the configuration is here
names        checkpoint tensor -> part of a parameter     source     where tensors come from, as a protocol
targets      what will be quantized                       sites      which Linears read the same tensor; the only hooks
experts      mixtures of experts; nothing else knows them
sanity       may a model be built from this config.json   packaged   the small model that a Python package ships

Quantizing it
blocks       load -> observe -> solve -> replay           workbench  what that works with; out of memory
states       hidden states between two blocks             room       where they are kept, as a protocol
passes       Grams under a budget, in passes of the text  collect    all of them at once, for many methods
solving      strengths, codes, on one rank or many        sharing    who does what; group: the ranks of a run
absorb       where channel scales can go, seen            rescale    the scales of one block, and who takes them up
joint        which layer can make up for earlier errors   first_look what each site costs at each width
ahead        the next block, read in the background       first_calls  what MKL must do alone before threads share it

Running it
inference    dense or packed                              packed     modules whose weights stay packed
decode       tokens one at a time, with a cache           stream     one block at a time, never whole
pretrained   transformers' from_pretrained on packed weights; registry: our seat in its tables
calibration  text or data set -> windows of tokens        tokenizer  whether its tokens are the model's
evaluate     perplexity, with its protocol                harness    lm-eval's tasks, and a cloze of our own
"""
