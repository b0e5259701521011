"""All cases."""

from scripts.references import hierarchies, regressions, series

CASES = (*regressions.CASES, *series.CASES, *hierarchies.CASES)
