"""Speed, measured beside its ceiling and its peers."""
