"""One run: the loop over blocks and what it works with.

plan          what is asked for, checked against the model
driver        block by block, in the model's own forward      block        one block, site by site
streams       quantized, reference and probe, side by side    forward      all micro-batches of a stream
micro_batch, task  one micro-batch, in a greenlet             points       where it suspends, by hooks
thread_state  what torch keeps for a thread                   stored_states  enters a model in its middle
offload       what suspended micro-batches hold, moved out    activation_store  where to; activation_memory: how much
grams         sums over micro-batches, folds and ranks        quantize_site     lambda, codes, on one rank or many
channel_scales  the scales of one block (AWQ)
sensitivity   what each site costs at each bit-width          bit_allocation    which layer gets how many bits
blockwise_forward  a text through a model, block by block     journal      stages, seconds and notes of a block
comm          the ranks of a run                              work_split   which rank does what
distributed   several processes at one run                    watchdog     notices ranks that hang
resume        finished blocks, the resume point               fingerprint  whether a run may go on from them
write         finished blocks -> checkpoint                   verify       is what was written whole and true
progress      who follows a run
"""
