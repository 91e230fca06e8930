"""Tensor files by range, untrusted JSON within limits, and durable file operations."""
