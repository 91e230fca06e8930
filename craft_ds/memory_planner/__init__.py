"""How much memory a run will take, found without allocating the model.

`simulate` runs one forward and backward pass of the policy's own loss on tensors without storage and
writes down how many bytes are alive between any two events. `plan` adds to that trace, by arithmetic
alone, what each engine keeps, gathers and reduces.
"""

ENGINES = ("single", "zero2", "zero3", "zero3_offload", "fsdp", "fsdp_offload")
