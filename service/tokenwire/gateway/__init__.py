"""HTTP and SSE in front of workers: a gRPC client of them, in their process or apart."""
