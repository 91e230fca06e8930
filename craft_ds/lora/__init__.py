"""Low-rank adapters by PEFT for policies whose full weights no rank ever holds.

PEFT makes the layers and names the stored tensors. Initial values, loading and merging, for which PEFT needs
the full weights in memory, are done here by range.
"""
