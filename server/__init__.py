"""The process: configuration, CLI, gRPC services, metrics."""
