"""Low-rank adapters by PEFT, made for policies whose weights no rank ever holds whole.

PEFT makes the layers and names what is stored; what it would do with whole weights in memory (initial values,
loading, merging) is done here by range.
"""
