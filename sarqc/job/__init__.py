"""One run from start to end: the rooms put together.

locate       a model's name -> its folder
plan         what is asked for, checked against the model     forecast/   what a run will take and who will serve it
run          quantize: model in, checkpoint out               work        finished blocks, the resume point
widths       which layer gets how many bits
distributed  several ranks at one run                         export      work folder -> checkpoint
reporting/   what a run leaves beside the weights             verify      is what was written whole and true
comparison/  methods x bits x sizes from one calibration      measure     perplexity of a checkpoint
load         a checkpoint as a model that runs                chat        a conversation with one
convert      one format into another, losslessly              doctor      what this machine can run
pretrained   what transformers' from_pretrained may keep packed   machine   what this machine has for a process
"""
