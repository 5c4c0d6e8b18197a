"""The `tokenwire` command: one file a subcommand, each a thin layer over the client, the service or the engine."""

import os

# gRPC writes lines of its own to stderr, one for every failed handshake of whoever connects, in a form that is not
# ours. It looks at this once, when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
