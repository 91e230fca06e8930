"""The mathematics of CRaFT on tensors and scalars; imports torch and the configuration only."""
