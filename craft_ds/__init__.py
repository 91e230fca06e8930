"""craft-ds: constrained retention fine-tuning of sharded vision-language-action policies."""
