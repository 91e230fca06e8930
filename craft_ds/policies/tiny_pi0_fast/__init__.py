"""The embedded tiny pi0_fast policy and its tokenizers."""
