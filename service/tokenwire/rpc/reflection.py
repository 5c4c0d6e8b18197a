"""Server reflection, `v1` and `v1alpha`, so that grpcurl and `buf curl` need no proto file.

grpcio-reflection speaks v1alpha only. The messages of v1 are the same on the wire, so one servicer answers both; the
descriptor of v1 is that of v1alpha under its own names, kept in a pool of ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import grpc
from google.protobuf import descriptor, descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import aio as reflection_aio

from tokenwire.rpc.layers import Registry

V1 = "grpc.reflection.v1"
V1ALPHA = "grpc.reflection.v1alpha"
_V1ALPHA_FILE = cast(descriptor.FileDescriptor, reflection_pb2.DESCRIPTOR)


def add_reflection(server: Registry, files: Iterable[descriptor.FileDescriptor]) -> None:
    """Registers both versions, describing the services of `files` and themselves."""
    pool = descriptor_pool.DescriptorPool()
    added: set[str] = set()
    names = [f"{V1}.ServerReflection"]
    for file in (*files, _V1ALPHA_FILE):
        _add_with_dependencies(pool, file, added)
        names.extend(service.full_name for service in file.services_by_name.values())
    pool.AddSerializedFile(_v1_file())

    servicer = reflection_aio.ReflectionServicer(names, pool=pool)
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for package in (V1, V1ALPHA):
        handler = grpc.method_handlers_generic_handler(f"{package}.ServerReflection", {"ServerReflectionInfo": method})
        server.add_generic_rpc_handlers((handler,))


def _add_with_dependencies(
    pool: descriptor_pool.DescriptorPool, file: descriptor.FileDescriptor, added: set[str]
) -> None:
    if file.name in added:
        return
    added.add(file.name)
    for dependency in file.dependencies:
        _add_with_dependencies(pool, dependency, added)
    pool.AddSerializedFile(file.serialized_pb)


def _v1_file() -> bytes:
    file = descriptor_pb2.FileDescriptorProto()
    _V1ALPHA_FILE.CopyToProto(file)
    file.name = "grpc/reflection/v1/reflection.proto"
    file.package = V1
    types = [field for message in file.message_type for field in message.field if field.type_name]
    methods = [method for service in file.service for method in service.method]
    for field in types:
        field.type_name = _renamed(field.type_name)
    for method in methods:
        method.input_type = _renamed(method.input_type)
        method.output_type = _renamed(method.output_type)
    return file.SerializeToString()


def _renamed(type_name: str) -> str:
    return type_name.replace(f".{V1ALPHA}.", f".{V1}.")
