"""The edge: a client's data, its local tuning and its evaluation."""
