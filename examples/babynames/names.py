"""How many babies got a name: 1.69 million rows, an effect for each of 131 years and for each name and sex.

Shapes: B rows; Y years; 2 x `names` groups (a pair that never occurs keeps its prior).
"""

import pyro
import pyro.distributions as dist

FIRST_YEAR, YEARS = 1880, 131


def births_model(name, sex, year, births=None, names=88_496):
    """log births ~ Normal(b0 + year effect + effect of name and sex, 0.8); all scales are fixed."""
    b0 = pyro.sample("b0", dist.Normal(0.0, 10.0))
    by_year = pyro.sample("by_year", dist.Normal(0.0, 0.5).expand([YEARS]).to_event(1))
    by_name = pyro.sample("by_name", dist.Normal(0.0, 1.2).expand([2 * names]).to_event(1))
    with pyro.plate("data", len(name)):
        mean = b0 + by_year[year - FIRST_YEAR] + by_name[2 * name + sex]
        pyro.sample("births", dist.Normal(mean, 0.8), obs=None if births is None else births.log())
