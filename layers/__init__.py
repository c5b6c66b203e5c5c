"""Parameters and arithmetic: norms, attention, feed-forward, experts, dispatch, blocks."""
