"""The gRPC face of the worker: servicers, the boundary around them, and conversion to and from messages."""
