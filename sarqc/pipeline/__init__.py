"""One run: the loop over blocks and what it works with.

plan          what is asked for, checked against the model
driver        load -> observe -> solve -> replay, block by block
workbench     what the driver works with; retries when memory runs out
passes        Grams under a budget, in passes of the text     collect      all of them at once, for many methods
quantize_site lambda, codes, on one rank or many              channel_scales  the scales of one block (AWQ)
sensitivity   what each site costs at each bit-width          bit_allocation  which layer gets how many bits
activations   hidden states between two blocks                offload      where they are kept if memory is short
comm          the ranks of a run                              work_split   which rank does what
distributed   several processes at one run                    watchdog     notices ranks that hang
resume        finished blocks, the resume point               fingerprint  whether a run may go on from them
write         finished blocks -> checkpoint                   verify       is what was written whole and true
forward       the model's own forward, all micro-batches suspended at blocks and sites (with points, walk, task,
              thread_state)                                   handed       a forward that enters a model in its middle
parking       what they hold, out of memory                   activation_store  where that is
stream        perplexity, one block at a time                 progress     who follows a run
"""
