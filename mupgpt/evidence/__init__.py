"""Does it transfer? Coordinate checks, verdicts, bridges and ladders."""
