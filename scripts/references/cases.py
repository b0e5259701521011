"""All cases."""

from scripts.references import fresh, hierarchies, regressions, series

CASES = (*regressions.CASES, *series.CASES, *hierarchies.CASES, *fresh.CASES)
