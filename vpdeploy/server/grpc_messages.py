"""The messages of the Open Inference Protocol v2 over gRPC, and of gRPC's health protocol.

They are declared here instead of taken from a client's package: the server needs protobuf alone, and stands beside any
client in one process, for its descriptors are in a pool of its own. Of Triton's ``ModelConfig`` those fields are here
that are filled; names and numbers are Triton's. A test compares all of it with the stubs of its client.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "inference.GRPCInferenceService"
HEALTH_SERVICE = "grpc.health.v1.Health"

MESSAGES: dict[str, dict[str, str]] = {
    "inference": {
        "ServerLiveRequest": "",
        "ServerLiveResponse": "bool live=1",
        "ServerReadyRequest": "",
        "ServerReadyResponse": "bool ready=1",
        "ModelReadyRequest": "string name=1, string version=2",
        "ModelReadyResponse": "bool ready=1",
        "ServerMetadataRequest": "",
        "ServerMetadataResponse": "string name=1, string version=2, repeated string extensions=3",
        "ModelMetadataRequest": "string name=1, string version=2",
        "ModelMetadataResponse": "string name=1, repeated string versions=2, string platform=3, "
        "repeated ModelMetadataResponse.TensorMetadata inputs=4, "
        "repeated ModelMetadataResponse.TensorMetadata outputs=5",
        "ModelMetadataResponse.TensorMetadata": "string name=1, string datatype=2, repeated int64 shape=3",
        "InferParameter": "bool bool_param=1, int64 int64_param=2, string string_param=3, double double_param=4, "
        "uint64 uint64_param=5",
        "ModelInferResponse": "string model_name=1, string model_version=2, string id=3, "
        "map InferParameter parameters=4, repeated ModelInferResponse.InferOutputTensor outputs=5, "
        "repeated bytes raw_output_contents=6",
        "ModelInferResponse.InferOutputTensor": "string name=1, string datatype=2, repeated int64 shape=3",
        "ModelStreamInferResponse": "string error_message=1, ModelInferResponse infer_response=2",
        "ModelConfigRequest": "string name=1, string version=2",
        "ModelConfigResponse": "ModelConfig config=1",
        "ModelConfig": "string name=1, string platform=2, int32 max_batch_size=4, repeated ModelInput input=5, "
        "repeated ModelOutput output=6, ModelDynamicBatching dynamic_batching=11, map ModelParameter parameters=14, "
        "string backend=17",
        "ModelInput": "string name=1, enum DataType data_type=2, repeated int64 dims=4",
        "ModelOutput": "string name=1, enum DataType data_type=2, repeated int64 dims=3",
        "ModelDynamicBatching": "uint64 priority_levels=4, uint64 default_priority_level=5",
        "ModelParameter": "string string_value=1",
        "ModelStatisticsRequest": "string name=1, string version=2",
        "ModelStatisticsResponse": "repeated ModelStatistics model_stats=1",
        "ModelStatistics": "string name=1, string version=2, uint64 last_inference=3, uint64 inference_count=4, "
        "uint64 execution_count=5, InferStatistics inference_stats=6, repeated InferBatchStatistics batch_stats=7",
        "InferStatistics": "StatisticDuration success=1, StatisticDuration fail=2, StatisticDuration queue=3, "
        "StatisticDuration compute_input=4, StatisticDuration compute_infer=5, StatisticDuration compute_output=6, "
        "StatisticDuration cache_hit=7, StatisticDuration cache_miss=8",
        "InferBatchStatistics": "uint64 batch_size=1, StatisticDuration compute_input=2, "
        "StatisticDuration compute_infer=3, StatisticDuration compute_output=4",
        "StatisticDuration": "uint64 count=1, uint64 ns=2",
        "RepositoryIndexRequest": "string repository_name=1, bool ready=2",
        "RepositoryIndexResponse": "repeated RepositoryIndexResponse.ModelIndex models=1",
        "RepositoryIndexResponse.ModelIndex": "string name=1, string version=2, string state=3, string reason=4",
        "RepositoryModelLoadRequest": "string repository_name=1, string model_name=2",
        "RepositoryModelLoadResponse": "",
        "RepositoryModelUnloadRequest": "string repository_name=1, string model_name=2",
        "RepositoryModelUnloadResponse": "",
    },
    "grpc.health.v1": {
        "HealthCheckRequest": "string service=1",
        "HealthCheckResponse": "enum ServingStatus status=1",
    },
}
"""Every message that is read or written by protobuf, by package; a request for inference is read by ``grpc_form``."""

_ENUMS = {
    "inference": {"DataType": {"TYPE_INVALID": 0, "TYPE_UINT8": 2, "TYPE_FP32": 11, "TYPE_STRING": 13}},
    "grpc.health.v1": {"ServingStatus": {"UNKNOWN": 0, "SERVING": 1, "NOT_SERVING": 2, "SERVICE_UNKNOWN": 3}},
}

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bool": _Field.TYPE_BOOL,
    "bytes": _Field.TYPE_BYTES,
    "double": _Field.TYPE_DOUBLE,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "string": _Field.TYPE_STRING,
    "uint64": _Field.TYPE_UINT64,
}


def message_class(name: str, package: str = "inference") -> Any:
    """Return the class of a message, of protobuf's own kind.

    Args:
        name: Its name, as in ``MESSAGES``.
        package: Its package.
    """
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{package}.{name}"))


def _build_pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    for package, messages in MESSAGES.items():
        file = descriptor_pb2.FileDescriptorProto(name=f"vpdeploy/{package}.proto", package=package, syntax="proto3")
        for name, values in _ENUMS[package].items():
            enum = file.enum_type.add(name=name)
            for value, number in values.items():
                enum.value.add(name=value, number=number)
        built: dict[str, descriptor_pb2.DescriptorProto] = {}
        for name, fields in messages.items():
            outer, _, inner = name.rpartition(".")
            built[name] = (built[outer].nested_type if outer else file.message_type).add(name=inner)
            for declaration in filter(None, fields.split(", ")):
                _add_field(built[name], f".{package}.{name}", package, declaration)
        pool.Add(file)
    return pool


def _add_field(message: descriptor_pb2.DescriptorProto, full_name: str, package: str, declaration: str) -> None:
    """Add a field as it is declared: ``[repeated|map|enum] type name=number``."""
    words, _, number = declaration.partition("=")
    *kind, type_name, name = words.split(" ")
    field = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
    if kind == ["map"]:  # on the wire, a list of entries with a key and a value
        entry = message.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        _add_field(entry, f"{full_name}.{entry.name}", package, "string key=1")
        _add_field(entry, f"{full_name}.{entry.name}", package, f"{type_name} value=2")
        field.type, field.type_name = _Field.TYPE_MESSAGE, f"{full_name}.{entry.name}"
    elif type_name in _SCALARS:
        field.type = _SCALARS[type_name]
    else:
        field.type = _Field.TYPE_ENUM if kind == ["enum"] else _Field.TYPE_MESSAGE
        field.type_name = f".{package}.{type_name}"
    if kind in (["repeated"], ["map"]):
        field.label = _Field.LABEL_REPEATED


_POOL = _build_pool()
