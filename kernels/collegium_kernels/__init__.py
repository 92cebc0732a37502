"""Token-level mixtures of experts: route, dispatch, experts, combine."""
