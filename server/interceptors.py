"""The one interceptor around our RPCs: request id, client, error mapping, a log line and a count for each call.

It runs on the event loop's thread. Handlers are wrapped as coroutines, also the streaming ones: grpc.aio does not close
a handler's async generator when the client goes away while a message is being written, so its `finally` would run when
the garbage collector comes by. Written as a coroutine that closes the generator itself, cancellation cleans up at once.
"""

import asyncio
import inspect
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any, TypeAlias, cast

import grpc
import structlog

from ..adapters.errors import ServingError
from .access import CLIENT_KEY
from .errors import BadRequestError
from .status import error_status

REQUEST_ID_KEY = "x-request-id"
MAX_REQUEST_ID_LENGTH = 128
MAX_CLIENT_LENGTH = 128
PACKAGES = ("lorikeet.", "google.longrunning.")

log = structlog.stdlib.get_logger(__name__)

# The id of the call that the current task serves; also bound to every log line of that task.
current_request_id: ContextVar[str] = ContextVar("current_request_id")
# Who its caller says it is; None: it does not say. Not proof of anything: whoever is let in can claim any name.
current_client: ContextVar[str | None] = ContextVar("current_client", default=None)

# Generic in the type stubs only, hence the quotes here and below.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"
OnCall = Callable[[str, str, str], None]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every RPC of package `lorikeet` and of operations; others (health, reflection) pass untouched.

    Args:
        on_call: called with method, gRPC code name and ErrorInfo reason ("" when there is none) as each call ends.
    """

    def __init__(self, on_call: OnCall) -> None:
        self._on_call = on_call

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Wrap the handler of one call."""
        handler = await continuation(handler_call_details)
        service, _, method = handler_call_details.method.removeprefix("/").partition("/")
        # None: there is no such method; gRPC then answers UNIMPLEMENTED.
        if handler is None or not service.startswith(PACKAGES) or handler.request_streaming:
            return handler
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                # The stubs know only generators here; grpc.aio also takes a coroutine that writes to the context.
                cast(Any, self._wrap(method, _stream_to_context(handler.unary_stream))),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            cast(Any, self._wrap(method, cast(Any, handler.unary_unary))),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _wrap(
        self, method: str, behaviour: Callable[[Any, Context], Awaitable[Any]]
    ) -> Callable[[Any, Context], Awaitable[Any]]:
        async def wrapped(request: Any, context: Context) -> Any:
            started = time.monotonic()
            request_id = uuid.uuid4().hex
            structlog.contextvars.clear_contextvars()
            code, reason, failure = "OK", "", None
            try:
                try:
                    request_id = _request_id(request, context) or request_id
                finally:
                    current_request_id.set(request_id)
                    structlog.contextvars.bind_contextvars(request_id=request_id)
                client = _client(context)
                current_client.set(client)
                if client is not None:
                    structlog.contextvars.bind_contextvars(client=client)
                await _send(context.send_initial_metadata(((REQUEST_ID_KEY, request_id),)))
                return await behaviour(request, context)
            except ServingError as error:
                code, reason = error.code.value, error.reason
                await _abort(context, error, request_id)
            except asyncio.CancelledError:
                # The client went away or its deadline passed; gRPC has answered already.
                expired = context.time_remaining() == 0
                code = reason = "DEADLINE_EXCEEDED" if expired else "CANCELLED"
                raise
            except Exception as error:
                code, reason, failure = "INTERNAL", "INTERNAL", error
                message = f"The server failed; its log has the traceback under request id {request_id}."
                await _abort(context, ServingError(message), request_id)
            finally:
                self._on_call(method, code, reason)
                fields = {"method": method, "code": code, "seconds": round(time.monotonic() - started, 6)}
                if reason:
                    fields["reason"] = reason
                if failure is None:
                    log.info("request", **fields)
                else:
                    log.error("request", exc_info=failure, **fields)

        return wrapped


def _stream_to_context(behaviour: Any) -> Callable[[Any, Context], Awaitable[None]]:
    """Make a streaming handler, be it an async generator or a coroutine that writes itself, a coroutine that writes."""
    if not inspect.isasyncgenfunction(behaviour):
        return cast(Callable[[Any, Context], Awaitable[None]], behaviour)

    async def write_all(request: Any, context: Context) -> None:
        responses = cast(AsyncIterator[Any], behaviour(request, context))
        async with aclosing(cast(Any, responses)):
            async for response in responses:
                await _send(context.write(response))

    return write_all


async def _send(operation: Awaitable[None]) -> None:
    """Await a write. It fails when the client has gone, often before grpc.aio cancels us: no error of ours."""
    try:
        await operation
    except grpc.aio.InternalError as error:
        raise asyncio.CancelledError from error


def _request_id(request: Any, context: Context) -> str:
    """The id that the client gave: the request's own field before the metadata; "" for none.

    Raises:
        BadRequestError: it is too long or has characters that do not belong into a log or a header.
    """
    given = str(getattr(request, "request_id", ""))
    if not given:
        for key, value in context.invocation_metadata() or ():
            if key == REQUEST_ID_KEY:
                given = value if isinstance(value, str) else ""
    if len(given) > MAX_REQUEST_ID_LENGTH or not all("!" <= character <= "~" for character in given):
        raise BadRequestError(
            f"request_id (or {REQUEST_ID_KEY} metadata) has {len(given)} characters; allowed: at most "
            f"{MAX_REQUEST_ID_LENGTH} printable ASCII characters without spaces.",
            {"field": "request_id"},
        )
    return given


def _client(context: Context) -> str | None:
    """The name that the caller gave itself in the metadata; None for none.

    Raises:
        BadRequestError: it is too long, has characters that do not belong into a log, or there are several, of which
            only somebody in between could know the right one.
    """
    given = [value for key, value in context.invocation_metadata() or () if key == CLIENT_KEY]
    if not given or given == [""]:
        return None
    name = given[0]
    if len(given) > 1:
        raise BadRequestError(f"The metadata has {CLIENT_KEY} {len(given)} times; give it once.", {"field": CLIENT_KEY})
    if not isinstance(name, str) or len(name) > MAX_CLIENT_LENGTH or not all(" " <= char <= "~" for char in name):
        raise BadRequestError(
            f"{CLIENT_KEY} metadata has {len(name)} characters; allowed: at most {MAX_CLIENT_LENGTH} printable ASCII "
            "characters.",
            {"field": CLIENT_KEY},
        )
    return name


async def _abort(context: Context, error: ServingError, request_id: str) -> None:
    status = error_status(error, request_id)
    await context.abort(status.code, status.message, status.trailing_metadata)
