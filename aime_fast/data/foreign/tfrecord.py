"""Records of TFRecord files, and the `tf.train.Example` in each, without TensorFlow.

A record is its length (uint64, little endian), a checksum of these 8 bytes, the payload and its checksum. Checksums are CRC-32C, rotated
right by 15 bits plus 0xa282ead8 (TensorFlow's guide to TFRecord; the messages: tensorflow/core/example/{example,feature}.proto).
google-crc32c checks some GB/s where pure Python, as in tensorboard's reader, checks a few MB/s. The messages are described to protobuf
here, since tensorboard ships no Example.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

from aime_fast.errors import DataError

Values = list[bytes] | np.ndarray  # of a feature: byte strings, or float32 or int64 [n]

MASK = 0xA282EAD8
HEAD, FOOT = 12, 4  # bytes around a payload: its length with checksum, its checksum


def records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and payload of each record of a file, one in memory at a time. Raises DataError where it is cut short or altered."""
    left, number = path.stat().st_size, 0
    with path.open("rb") as file:
        while left:
            where = f"{path}: record {number}"
            head = _take(file, HEAD, left, where)
            if _masked(head[:8]) != head[8:]:
                raise DataError(f"{where}: the checksum of its length is wrong; copy the file again, or leave it out")
            size = int.from_bytes(head[:8], "little")
            payload = _take(file, size, left - HEAD - FOOT, where)
            if _masked(payload) != file.read(FOOT):
                raise DataError(f"{where}: the checksum of its {size} bytes is wrong; copy the file again, or leave it out")
            yield number, payload
            left -= HEAD + size + FOOT
            number += 1


def _take(file: BinaryIO, size: int, left: int, where: str) -> bytes:
    """Nothing is read where the file ends before, so a length that is too large costs no memory."""
    if size > left:
        raise DataError(f"{where}: {size} bytes, the file has {max(left, 0)} of them, so it is cut short; copy it again, or leave it out")
    return file.read(size)


def _masked(part: bytes) -> bytes:
    crc = google_crc32c.value(part)
    return (((crc >> 15 | crc << 17) + MASK) & 0xFFFFFFFF).to_bytes(4, "little")


def features(payload: bytes) -> Mapping[str, Any]:
    """The features of a serialised Example, for `values`. Raises protobuf's DecodeError where it is none."""
    return _example().FromString(payload).features.feature


def values(feature: Any) -> Values:
    """What a feature holds, as one flat list."""
    kind = feature.WhichOneof("kind")
    if kind is None:
        return []
    held = getattr(feature, kind).value
    return list(held) if kind == "bytes_list" else np.fromiter(held, {"float_list": np.float32, "int64_list": np.int64}[kind], len(held))


@cache
def _example() -> Any:
    """The class of Example, in a pool of its own: TensorFlow, where it is loaded, has registered the names."""
    from google.protobuf import descriptor_pool, message_factory
    from google.protobuf.descriptor_pb2 import FieldDescriptorProto as Field
    from google.protobuf.descriptor_pb2 import FileDescriptorProto

    file = FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")

    def message(where: Any, name: str, *fields: tuple[str, int | str, bool]) -> Any:
        """Fields: name, type or message, repeated; numbered from 1."""
        found = where.add(name=name)
        for number, (field, kind, repeated) in enumerate(fields, 1):
            label = Field.LABEL_REPEATED if repeated else Field.LABEL_OPTIONAL
            of = {"type": kind} if isinstance(kind, int) else {"type": Field.TYPE_MESSAGE, "type_name": f".tensorflow.{kind}"}
            found.field.add(name=field, number=number, label=label, **of)
        return found

    for name, kind in (("BytesList", Field.TYPE_BYTES), ("FloatList", Field.TYPE_FLOAT), ("Int64List", Field.TYPE_INT64)):
        message(file.message_type, name, ("value", kind, True))
    kinds = (("bytes_list", "BytesList", False), ("float_list", "FloatList", False), ("int64_list", "Int64List", False))
    feature = message(file.message_type, "Feature", *kinds)
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    everything = message(file.message_type, "Features", ("feature", "Features.FeatureEntry", True))
    entry = message(everything.nested_type, "FeatureEntry", ("key", Field.TYPE_STRING, False), ("value", "Feature", False))
    entry.options.map_entry = True
    message(file.message_type, "Example", ("features", "Features", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))
