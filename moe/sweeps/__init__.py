"""Comparisons of many runs: arms at matched budgets, tuned equally, with fresh seeds."""
