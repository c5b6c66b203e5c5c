"""Parameters and arithmetic: norms, positions, attention, feed-forward, experts, dispatch, blocks."""
