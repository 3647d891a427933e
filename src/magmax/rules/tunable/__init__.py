"""The rule tunable: exact shares of each model under a preference."""
