"""The coordinator: rounds, cohorts, aggregation, checkpoints."""
