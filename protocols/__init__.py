"""What travels between producers and workers: jobs, replies, rollout states, errors, dialects, the queue protocol."""
