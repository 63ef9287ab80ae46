"""RLDP: what chooses clip norms, shares of the noise and its size, from what is public.

A policy is asked for the shape of each release and is shown what came out of it, and
nothing else: ``sight.py`` has the only types that reach it.
"""
