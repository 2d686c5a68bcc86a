"""One run from start to end: the rooms put together.

locate   a model's name -> its folder
report   what a run leaves behind beside the weights: _facts what it says, _page and card to whom, svg the charts
run      quantize: model in, checkpoint out
load     a checkpoint, quantized or not, as a model that runs
measure  perplexity of a checkpoint
chat     a conversation with a checkpoint       pretrained  what transformers' from_pretrained may keep packed
"""
