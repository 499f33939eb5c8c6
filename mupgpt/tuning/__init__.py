"""Sweeps: what is searched, who searches, and what was found. Optuna's studies throughout."""
