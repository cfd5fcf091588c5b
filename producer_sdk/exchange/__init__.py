"""One exchange of HTTP as a job: a request becomes options and a body, a reply becomes status, headers and a body.

The transport (`producer_sdk/transport.py`) and the gateway (`producer_sdk/gateway/`) differ only in where a request
comes from; what it means is decided here, so that the official clients cannot tell them apart.
"""
