"""Random disturbances of a whole installation, and what has to hold after each round of them.

`make chaos`, or `python -m chaos --rounds 20 --seed 7` with tests/ in PYTHONPATH. `world` is the lab, `disturbances`
what is done to it, `attacker` what is thrown at it, `invariants` what has to hold, `run` the rounds and the report.
"""
