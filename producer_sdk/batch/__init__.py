"""Offline batches: a file of requests in, a file of answers out; killed at any moment, it goes on where it was.

`survey` reads and checks the input, `Journal` is what is done on disk, `Runner` carries rows to the pool and replies
to the journal. Each row is one job whose id follows from batch and line, so that a runner that starts again asks for
the same jobs and gets the replies that are there.
"""
