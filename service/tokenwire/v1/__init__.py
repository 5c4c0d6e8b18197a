"""Generated protobuf stubs of `tokenwire.v1` join this package when it is built."""
