"""Tensor files and JSON read by range and with limits; durable file operations."""
