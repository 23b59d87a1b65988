"""Which layers share a round: tracing, levels, the regrouped forward, the plan."""
