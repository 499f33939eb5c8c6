"""What a run will need, from formulas: FLOPs, bytes, days, and how it fits."""
