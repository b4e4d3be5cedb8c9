"""Which channels go: scores, budgets, plans."""
