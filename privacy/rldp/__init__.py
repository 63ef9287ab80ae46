"""RLDP: what chooses clip norms, shares of the noise and its size, from what is public.

A policy is asked for the shape of each release and is shown what came out of it, and
nothing else: ``sight.py`` has the only types that reach it.
"""

__all__ = ["DECISIONS"]

DECISIONS = "decisions.jsonl"
"""Log of what a policy chose: the server's in the run's folder, a client's in its own."""
