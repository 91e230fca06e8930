"""Memory planner: bytes per rank of a run, computed without allocating the model.

`simulate` runs one forward and backward pass of the policy's own loss on tensors without storage and
records how many bytes are alive between any two events. `plan` adds to that trace, by arithmetic
only, what each engine keeps, gathers and reduces.
"""

ENGINES = ("single", "zero2", "zero3", "zero3_offload", "fsdp", "fsdp_offload")
