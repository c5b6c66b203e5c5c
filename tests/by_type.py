"""The type checker of the tests: beartype, by the annotations of the three packages.

Numbers as PEP 484 has them: an int may stand where a float is asked for.
"""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
