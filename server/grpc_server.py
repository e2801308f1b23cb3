"""The gRPC server around the services: options, health, reflection, and the order in which it goes down."""

import grpc
from google.longrunning import operations_pb2  # type: ignore[import-untyped]
from google.longrunning.operations_pb2_grpc import (  # type: ignore[import-untyped]
    OperationsServicer,
    add_OperationsServicer_to_server,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection

from ..protos.v1 import adapters_pb2, generation_pb2, merges_pb2
from ..protos.v1.adapters_pb2_grpc import AdapterServiceServicer, add_AdapterServiceServicer_to_server
from ..protos.v1.generation_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server
from ..protos.v1.merges_pb2_grpc import MergeServiceServicer, add_MergeServiceServicer_to_server
from .addresses import cannot_listen, join_address
from .interceptors import ErrorInterceptor, OnCall

GENERATION_SERVICE = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
ADAPTER_SERVICE = adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name
MERGE_SERVICE = merges_pb2.DESCRIPTOR.services_by_name["MergeService"].full_name
OPERATIONS_SERVICE = operations_pb2.DESCRIPTOR.services_by_name["Operations"].full_name
SERVICES = (GENERATION_SERVICE, ADAPTER_SERVICE, MERGE_SERVICE, OPERATIONS_SERVICE)

# What a health check can ask for; "" is the server as a whole.
HEALTH_NAMES = ("", *SERVICES)

KEEPALIVE_OPTIONS = [
    # Find clients that vanished without a word, so that their requests do not run to the end for nobody.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A unary call sends nothing back until it has its whole answer, and gRPC takes clients that ping meanwhile for
    # abusers: GOAWAY "too_many_pings", and the call is lost. So no ping is ever held against a client.
    ("grpc.http2.max_ping_strikes", 0),
]


class GrpcServer:
    """A server with our services, health and reflection.

    Args:
        max_message_bytes: largest message taken.
        on_call: told of every ended call; see ErrorInterceptor.
    """

    def __init__(self, max_message_bytes: int, on_call: OnCall) -> None:
        self._server = grpc.aio.server(
            interceptors=[ErrorInterceptor(on_call)],
            options=[
                *KEEPALIVE_OPTIONS,
                ("grpc.max_receive_message_length", max_message_bytes),
                # With SO_REUSEPORT a second server on a port in use would start, and take half of the calls.
                ("grpc.so_reuseport", 0),
            ],
        )
        self._health = health.HealthServicer()

    async def start(
        self,
        host: str,
        port: int,
        generation: GenerationServiceServicer,
        adapters: AdapterServiceServicer,
        merges: MergeServiceServicer,
        operations: OperationsServicer,
    ) -> int:
        """Listen and report SERVING.

        Returns:
            The port, also where 0 was asked for.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        add_GenerationServiceServicer_to_server(generation, self._server)
        add_AdapterServiceServicer_to_server(adapters, self._server)
        add_MergeServiceServicer_to_server(merges, self._server)
        add_OperationsServicer_to_server(operations, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*SERVICES, HEALTH_SERVICE, reflection.SERVICE_NAME), self._server)
        try:
            bound = self._server.add_insecure_port(join_address(host, port))
        except RuntimeError as error:
            raise cannot_listen("gRPC", host, port, "--") from error
        for name in HEALTH_NAMES:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()
        return bound

    async def stop_serving(self) -> None:
        """Report NOT_SERVING from now on; calls are still answered."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_s: float) -> None:
        """Take no more calls; cancel those that are left after `grace_s` seconds."""
        await self._server.stop(grace_s)
