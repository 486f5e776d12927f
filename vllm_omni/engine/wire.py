"""The messages between a front end and its engine process: msgpack of typed structs in frames of limited length.

Nothing here can make an object that is not listed: a frame is one of the messages below, pictures are raw pixels,
arrays are dtype, shape and bytes, errors are a name of `vllm_omni/errors.py` and a text. Knows no engine, no asyncio.
"""

from __future__ import annotations

import struct
import sys
from typing import Any

import msgspec
from msgspec import Struct

import vllm_omni.errors as errors
from vllm_omni.engine.interface import EngineCondition, EngineStats, ModelInfo
from vllm_omni.engine.pictures import CHANNELS, PackedPicture, Place, SharedPicture
from vllm_omni.errors import InvalidValueError, OmniError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.outputs import OmniRequestOutput

HEADER = struct.Struct("!I")
DEVICE_LOST = 3  # the exit code of an engine process whose device fails in every call
MAX_FRAME_BYTES = 512 * 2**20
_MAX_DIMENSIONS = 16
_PICTURE, _ARRAY, _TENSOR, _SHARED = 1, 2, 3, 4
_DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "int32": 4, "int64": 8, "uint8": 1, "bool": 1}
_ATTRIBUTES = ("field", "value", "waiting", "retry_after_s")  # of our errors, beside the text


class Start(Struct, tag=True):
    """The first message to the engine: what to load."""

    engine_args: dict[str, Any]
    warmup: bool
    heartbeat_s: float
    log_json: bool = False
    condition: EngineCondition | None = None  # of the process that this one replaces
    log_prompts: bool = False
    replica: int = 0  # which of several it is: they take the devices in turn
    replicas: int = 1
    costs: UnitCosts | None = None  # as the process before it had measured them
    step_timeout_s: float | None = None  # what the front end takes for a hang
    trials: bool = True  # False: the process before this one ended while it had no request


class Add(Struct, tag=True):
    """A request; `arrived` and `deadline` are of the machine's monotonic clock."""

    request_id: str
    prompt: Any
    params: dict[str, Any]
    priority: int
    arrived: float
    deadline: float | None
    salt: str = ""


class Abort(Struct, tag=True):
    request_ids: list[str]


class Close(Struct, tag=True):
    """End everything."""


class LoadAdapter(Struct, tag=True):
    name: str
    path: str
    held: list[str] = []  # adapters that are not pushed out: requests that the engine has not heard of name them


class UnloadAdapter(Struct, tag=True):
    """Requests that have been accepted keep it."""

    name: str


class Sleep(Struct, tag=True):
    """Level 1 keeps the weights in main memory, level 2 drops them. Accepted requests end first."""

    level: int = 1


class Wake(Struct, tag=True):
    """End the sleep, if the engine sleeps."""


class UpdateWeights(Struct, tag=True):
    """Take weights from a folder, as soon as no request is between two steps of its own; those that wait, wait."""

    path: str
    modules: list[str] | None = None  # components of the pipeline; None: all that the folder has


class StartProfile(Struct, tag=True):
    """Trace the next steps, and write the trace into the folder."""

    folder: str
    steps: int


class StopProfile(Struct, tag=True):
    """Write the trace now."""


Action = LoadAdapter | UnloadAdapter | Sleep | Wake | UpdateWeights | StartProfile | StopProfile


class Control(Struct, tag=True):
    """Something to be done to the engine between two steps."""

    control_id: str
    action: Action


class Loaded(Struct, tag=True):
    """The engine can serve."""

    info: ModelInfo
    condition: EngineCondition


class StartFailed(Struct, tag=True):
    error: Exception


class Refused(Struct, tag=True):
    """A request was refused before it began."""

    request_id: str
    error: Exception


class Outputs(Struct, tag=True):
    """Requests that ended, or progress of those that run; without their prompts."""

    outputs: list[OmniRequestOutput]


class Controlled(Struct, tag=True):
    """The condition after a `Control`, and why it was not done; without an id, the condition changed by itself."""

    control_id: str
    condition: EngineCondition
    error: Exception | None = None


class UnitCosts(Struct):
    """Seconds of one row of a forward, computed or skipped, and of the ends of a request, by pixels of a picture."""

    computed: dict[int, float]
    skipped: dict[int, float]
    ends: dict[int, float]
    cached_share: float  # how much of its steps a request with a cache computes, of late
    alone: dict[int, float] = {}  # like `computed`, of a row that has the forward to itself
    unshared: float = 1.0  # of that, what a row in company costs
    unshared_of: dict[int, float] = {}  # the same, by pixels


class StatsReport(Struct, tag=True):
    """Counters and gauges, what work costs, and each unfinished request's seconds left (by itself) and its pixels."""

    stats: EngineStats
    costs: UnitCosts
    jobs: dict[str, tuple[float, int]] = {}


class StateReport(Struct, tag=True):
    """A report as a front on another machine needs it, with the word of `ReplicaStats.state`."""

    state: str
    condition: EngineCondition
    report: StatsReport


class Heartbeat(Struct, tag=True):
    """The process lives; `turn_s` is how long its loop has been in the present turn, None while it waits."""

    turn_s: float | None


class _Named(Struct):
    """What every message about one request has."""

    request_id: str = ""


Command = Start | Add | Abort | Control | Close
EngineEvent = Loaded | StartFailed | Refused | Outputs | Controlled | StatsReport | StateReport | Heartbeat


def given_parameters(params: OmniDiffusionSamplingParams) -> dict[str, Any]:
    """The parameters that were set, as an `Add` carries them."""
    given = {name: value for name, value in params if value is not None}
    if params.lora_request:
        given["lora_request"] = [{"name": name, "scale": scale} for name, scale in params.lora_request]
    return given


def encode(message: Struct) -> bytearray:
    """A message as a frame; InvalidValueError if something in it must not cross, or is too long."""
    frame = bytearray(HEADER.size)  # pictures are large: one buffer, no copy of it
    try:
        _ENCODER.encode_into(message, frame, HEADER.size)
    except (TypeError, ValueError, ArithmeticError, RuntimeError, OSError, MemoryError) as error:  # whatever it held
        raise InvalidValueError("request", type(message).__name__, f"must hold plain values only ({error})") from None
    if (length := len(frame) - HEADER.size) > MAX_FRAME_BYTES:
        raise InvalidValueError("request", f"{length} bytes", f"must be at most {MAX_FRAME_BYTES} bytes")
    HEADER.pack_into(frame, 0, length)
    return frame


def decode_command(body: bytes | bytearray) -> Command:
    """A command of a frame's body; ValueError for anything else."""
    return _decode(_COMMANDS, body)


def request_id_of(body: bytes | bytearray) -> str:
    """The request that a frame's body is about, even if the rest of it cannot be read; empty if it names none."""
    try:
        return _NAMED.decode(body).request_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""


def decode_event(body: bytes | bytearray) -> EngineEvent:
    """An event of a frame's body; ValueError for anything else."""
    return _decode(_EVENTS, body)


def _decode(decoder: msgspec.msgpack.Decoder[Any], body: bytes | bytearray) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError, OverflowError) as error:
        raise ValueError(str(error)) from None


def _encode_other(value: Any) -> Any:
    """Encode what msgpack has no type for; classes are looked up among loaded modules: nothing heavy is imported."""
    if isinstance(value, Exception):
        return _error_as_dict(value)
    if isinstance(value, PackedPicture):
        return msgspec.msgpack.Ext(_PICTURE, value.packed)
    if isinstance(value, SharedPicture):
        return msgspec.msgpack.Ext(_SHARED, msgspec.msgpack.encode(value.place))
    for module, name, as_ext in (
        ("PIL.Image", "Image", _picture),
        ("torch", "Tensor", _tensor),
        ("numpy", "ndarray", _array),
    ):
        if (loaded := sys.modules.get(module)) is not None and isinstance(value, vars(loaded)[name]):
            return as_ext(value)
    raise TypeError(f"a {type(value).__name__} cannot be sent to the engine")


def _picture(image: Any) -> msgspec.msgpack.Ext:
    if image.mode not in CHANNELS:
        image = image.convert("RGBA" if "transparency" in image.info or image.mode in ("LA", "PA") else "RGB")
    if min(image.size) < 1:
        raise TypeError("an empty picture cannot be sent to the engine")
    return msgspec.msgpack.Ext(_PICTURE, msgspec.msgpack.encode((image.mode, image.size, image.tobytes())))


def _array(array: Any) -> msgspec.msgpack.Ext:
    _check_array("an array", str(array.dtype), array.ndim)
    return msgspec.msgpack.Ext(_ARRAY, msgspec.msgpack.encode((str(array.dtype), array.shape, array.tobytes())))


def _tensor(tensor: Any) -> msgspec.msgpack.Ext:
    import torch

    name = str(tensor.dtype).removeprefix("torch.")
    _check_array("a tensor", name, tensor.ndim)
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return msgspec.msgpack.Ext(_TENSOR, msgspec.msgpack.encode((name, tuple(tensor.shape), data)))


def _check_array(what: str, dtype: str, dimensions: int) -> None:
    if dtype not in _DTYPES:
        raise TypeError(f"{what} of {dtype} cannot be sent; use one of {', '.join(_DTYPES)}")
    if dimensions > _MAX_DIMENSIONS:
        raise TypeError(f"{what} of {dimensions} dimensions cannot be sent; at most {_MAX_DIMENSIONS}")


def _decode_ext(code: int, data: memoryview) -> Any:
    if code == _PICTURE:
        mode, size, pixels = msgspec.msgpack.decode(data, type=tuple[str, tuple[int, int], bytes])
        return _as_picture(mode, size, pixels)
    if code == _SHARED:
        return msgspec.msgpack.decode(data, type=Place)
    if code in (_ARRAY, _TENSOR):
        name, shape, content = msgspec.msgpack.decode(data, type=tuple[str, tuple[int, ...], bytes])
        return _as_array(name, shape, content, torch_too=code == _TENSOR)
    raise ValueError(f"extension {code} is unknown")


def _as_picture(mode: str, size: tuple[int, int], pixels: bytes) -> Any:
    from PIL import Image

    if mode not in CHANNELS or min(size) < 1 or size[0] * size[1] * CHANNELS[mode] != len(pixels):
        raise ValueError(f"a picture of {mode} {size} does not have {len(pixels)} bytes")
    return Image.frombytes(mode, size, pixels)


def _as_array(name: str, shape: tuple[int, ...], content: bytes, torch_too: bool) -> Any:
    count = 1
    for length in shape:
        count *= length
    known = name in _DTYPES and len(shape) <= _MAX_DIMENSIONS and min(shape, default=0) >= 0
    if not known or count * _DTYPES[name] != len(content):
        raise ValueError(f"an array of {name} {shape} does not have {len(content)} bytes")
    if torch_too:
        import torch

        if not content:
            return torch.zeros(shape, dtype=vars(torch)[name])
        return torch.frombuffer(bytearray(content), dtype=vars(torch)[name]).reshape(shape)
    import numpy

    return numpy.frombuffer(bytearray(content), dtype=name).reshape(shape)


def _error_as_dict(error: Exception) -> dict[str, Any]:
    """Encode our own errors with their text, of any other the class alone: its text may hold paths and addresses."""
    if not isinstance(error, OmniError):
        text = f"{type(error).__name__} while the request ran; the engine's log has the details"
        return {"kind": "OmniError", "text": text}
    known = next(kind.__name__ for kind in type(error).__mro__ if vars(errors).get(kind.__name__) is kind)
    given = {name: _sendable(value) for name, value in vars(error).items() if name in _ATTRIBUTES}
    return {"kind": known, "text": _sendable(str(error))} | given


def _sendable(value: Any) -> Any:
    """The short text or number that an attribute of ours is; msgpack's integers end at 64 bits, its text at UTF-8."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    return str(value) if isinstance(value, int) and value.bit_length() > 63 else value


def _decode_custom(kind: type, value: Any) -> Any:
    if kind is not Exception or not isinstance(value, dict):
        raise NotImplementedError(kind)
    known = vars(errors).get(str(value.get("kind")))
    if not (isinstance(known, type) and issubclass(known, OmniError)):
        known = OmniError
    error = known.__new__(known)
    Exception.__init__(error, str(value.get("text")))
    vars(error).update({name: value[name] for name in _ATTRIBUTES if name in value})
    return error


def decoder_of(kinds: Any) -> msgspec.msgpack.Decoder[Any]:
    """A decoder of frames' bodies of these kinds, and of nothing else."""
    return msgspec.msgpack.Decoder(kinds, ext_hook=_decode_ext, dec_hook=_decode_custom)


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_encode_other)
_NAMED = msgspec.msgpack.Decoder(_Named)
_COMMANDS, _EVENTS = decoder_of(Command), decoder_of(EngineEvent)
