"""The mathematics: Gaussian steps, paths, adjoints and losses; torch only."""
