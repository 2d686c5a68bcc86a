"""The only room that knows files: a Hugging Face checkpoint folder comes in here and leaves here.

files     which files of a folder may be touched, and JSON in and out
headers   the safetensors file format: what a header says, how one is made
shards    one open safetensors file; the list of them that makes a checkpoint
reader    `open_checkpoint`: tensors by name, one at a time, also out of a quantized checkpoint
manifest  the sum of every tensor that was written
state     files that are whole or absent: shards with their sums, JSON with its own
assemble  finished shards and single tensors become a checkpoint
convert   a checkpoint in another format
folders   an output folder that appears whole or not at all
side_files  tokenizer, templates, licence, config.json
file_sums  the sum of every file beside the weights
formats   how a quantized weight lies on disk
low_precision  FP8, FP4 and INT8 weights as dense ones
verify    reads back what was written
differences  what was written against what it was made of

Everything wrong with a file is a `CheckpointError` of one line that names it.
"""
