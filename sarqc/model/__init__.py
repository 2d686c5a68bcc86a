"""The model room: the only one that knows transformers.

calibration  text or data set -> windows of tokens        sites      which Linears read the same tensor; the only hooks
packaged     the small model that a Python package ships  blocks     load -> observe -> solve -> replay, block by block
source       where tensors come from, as a protocol       inference  a quantized model that runs
skeleton     the model without its weights                evaluate   perplexity, with its protocol
experts      mixtures of experts; nothing else knows them
absorb       where channel scales can go, seen and proved  rescale   the scales of one block, and who takes them up
states       hidden states between two blocks              room       where they are kept, as a protocol
ahead        the next block, read in the background        passes     Grams under a budget, in passes of the text
packed       modules whose weights stay packed             decode     tokens one at a time, with a cache
pretrained   transformers' from_pretrained and save_pretrained on packed weights; registry: our seat in its tables
first_calls  what MKL must do alone before threads share it
"""
