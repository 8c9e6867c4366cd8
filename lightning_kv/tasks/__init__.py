"""LightningModules and the settings of the commands."""
