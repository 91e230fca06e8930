"""Configuration: the dataclasses behind the flags, and the parser."""
