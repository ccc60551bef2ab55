"""LightningModules: one training loop each; the mathematics is in ``emf_lightning.flow``."""
