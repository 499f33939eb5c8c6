"""CARBS (arXiv 2306.08055): search along the front of cost and loss."""
