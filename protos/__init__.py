"""Protocol buffers of the gRPC interface and their generated stubs."""
