"""The queue protocol on Redis: keys, atomic steps, and those steps as typed calls."""
