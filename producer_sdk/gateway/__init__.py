"""The HTTP front: a producer like any other, in a process of its own.

Every request is a job in Redis; what a gateway holds is open connections and counts of them. Two gateways of one pool
know nothing of each other, and need not.
"""
