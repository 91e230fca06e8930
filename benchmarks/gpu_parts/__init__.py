"""Parts of `gpu_check.py`. Each has `run(small) -> dict` and `table(result) -> lines of Markdown`."""
