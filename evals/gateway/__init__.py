"""What the gateway itself costs: a stub upstream, a load generator, baselines, and the run that compares them."""
