"""Assignment of layers to rounds: tracing, dependency levels, the regrouped forward and the plan."""
