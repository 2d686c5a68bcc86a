"""Which runtime runs a checkpoint: `rules` has what their sources say, `compatibility` applies them to a model."""
