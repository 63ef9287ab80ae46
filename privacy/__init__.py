"""The guarantee, and the only place that may promise one.

Here will live: privacy events and sampling, clipping and noise, accounting, the
ledger of what was spent, secure aggregation, audits and reports. There is
nothing yet: this release gives no differential privacy.
"""
