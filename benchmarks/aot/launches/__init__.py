"""Calls that launch every kernel configuration of an operation; `jobs` runs them on a GPU that is not there.

Sizes are small and multiples of 16, as those of models are, unless a name says "odd". Contents do not matter: nothing
is computed.
"""
