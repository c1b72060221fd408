import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Task(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_UNSPECIFIED: _ClassVar[Task]
    TASK_T2I: _ClassVar[Task]
    TASK_S2I: _ClassVar[Task]
    TASK_I2I: _ClassVar[Task]
    TASK_TI2I: _ClassVar[Task]
    TASK_T2V: _ClassVar[Task]
    TASK_S2V: _ClassVar[Task]
    TASK_V2V: _ClassVar[Task]
    TASK_TV2V: _ClassVar[Task]

class Schedule(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCHEDULE_UNSPECIFIED: _ClassVar[Schedule]
    SCHEDULE_WAVE: _ClassVar[Schedule]
    SCHEDULE_RASTER: _ClassVar[Schedule]

class ImageFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMAGE_FORMAT_UNSPECIFIED: _ClassVar[ImageFormat]
    IMAGE_FORMAT_PNG: _ClassVar[ImageFormat]
    IMAGE_FORMAT_WEBP: _ClassVar[ImageFormat]
    IMAGE_FORMAT_GIF: _ClassVar[ImageFormat]
    IMAGE_FORMAT_RAW_RGB: _ClassVar[ImageFormat]

class AnimationFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ANIMATION_FORMAT_UNSPECIFIED: _ClassVar[AnimationFormat]
    ANIMATION_FORMAT_WEBP: _ClassVar[AnimationFormat]
    ANIMATION_FORMAT_GIF: _ClassVar[AnimationFormat]
TASK_UNSPECIFIED: Task
TASK_T2I: Task
TASK_S2I: Task
TASK_I2I: Task
TASK_TI2I: Task
TASK_T2V: Task
TASK_S2V: Task
TASK_V2V: Task
TASK_TV2V: Task
SCHEDULE_UNSPECIFIED: Schedule
SCHEDULE_WAVE: Schedule
SCHEDULE_RASTER: Schedule
IMAGE_FORMAT_UNSPECIFIED: ImageFormat
IMAGE_FORMAT_PNG: ImageFormat
IMAGE_FORMAT_WEBP: ImageFormat
IMAGE_FORMAT_GIF: ImageFormat
IMAGE_FORMAT_RAW_RGB: ImageFormat
ANIMATION_FORMAT_UNSPECIFIED: AnimationFormat
ANIMATION_FORMAT_WEBP: AnimationFormat
ANIMATION_FORMAT_GIF: AnimationFormat

class RawFrames(_message.Message):
    __slots__ = ("data", "frame_count", "height", "width")
    DATA_FIELD_NUMBER: _ClassVar[int]
    FRAME_COUNT_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    frame_count: int
    height: int
    width: int
    def __init__(self, data: _Optional[bytes] = ..., frame_count: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ...) -> None: ...

class Media(_message.Message):
    __slots__ = ("encoded", "raw")
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    encoded: bytes
    raw: RawFrames
    def __init__(self, encoded: _Optional[bytes] = ..., raw: _Optional[_Union[RawFrames, _Mapping]] = ...) -> None: ...

class Box(_message.Message):
    __slots__ = ("left", "top", "width", "height")
    LEFT_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    left: int
    top: int
    width: int
    height: int
    def __init__(self, left: _Optional[int] = ..., top: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...

class BoxList(_message.Message):
    __slots__ = ("boxes",)
    BOXES_FIELD_NUMBER: _ClassVar[int]
    boxes: _containers.RepeatedCompositeFieldContainer[Box]
    def __init__(self, boxes: _Optional[_Iterable[_Union[Box, _Mapping]]] = ...) -> None: ...

class Mask(_message.Message):
    __slots__ = ("picture", "boxes")
    PICTURE_FIELD_NUMBER: _ClassVar[int]
    BOXES_FIELD_NUMBER: _ClassVar[int]
    picture: Media
    boxes: BoxList
    def __init__(self, picture: _Optional[_Union[Media, _Mapping]] = ..., boxes: _Optional[_Union[BoxList, _Mapping]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "guidance_scale", "seed", "sample_index")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_INDEX_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    guidance_scale: float
    seed: int
    sample_index: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., guidance_scale: _Optional[float] = ..., seed: _Optional[int] = ..., sample_index: _Optional[int] = ...) -> None: ...

class Output(_message.Message):
    __slots__ = ("format", "scale_factor", "include_tokens")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    SCALE_FACTOR_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    format: ImageFormat
    scale_factor: int
    include_tokens: bool
    def __init__(self, format: _Optional[_Union[ImageFormat, str]] = ..., scale_factor: _Optional[int] = ..., include_tokens: _Optional[bool] = ...) -> None: ...

class TokenGrid(_message.Message):
    __slots__ = ("tokens", "height", "width")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    height: int
    width: int
    def __init__(self, tokens: _Optional[_Iterable[int]] = ..., height: _Optional[int] = ..., width: _Optional[int] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("index", "data", "format", "height", "width", "token_grid", "chunk_index", "chunk_count")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_GRID_FIELD_NUMBER: _ClassVar[int]
    CHUNK_INDEX_FIELD_NUMBER: _ClassVar[int]
    CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    index: int
    data: bytes
    format: ImageFormat
    height: int
    width: int
    token_grid: TokenGrid
    chunk_index: int
    chunk_count: int
    def __init__(self, index: _Optional[int] = ..., data: _Optional[bytes] = ..., format: _Optional[_Union[ImageFormat, str]] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., token_grid: _Optional[_Union[TokenGrid, _Mapping]] = ..., chunk_index: _Optional[int] = ..., chunk_count: _Optional[int] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_duration", "encode_duration", "decode_duration", "pixel_duration", "total_duration", "step_count", "ranking_duration", "prefill_duration", "encoding_duration")
    QUEUE_DURATION_FIELD_NUMBER: _ClassVar[int]
    ENCODE_DURATION_FIELD_NUMBER: _ClassVar[int]
    DECODE_DURATION_FIELD_NUMBER: _ClassVar[int]
    PIXEL_DURATION_FIELD_NUMBER: _ClassVar[int]
    TOTAL_DURATION_FIELD_NUMBER: _ClassVar[int]
    STEP_COUNT_FIELD_NUMBER: _ClassVar[int]
    RANKING_DURATION_FIELD_NUMBER: _ClassVar[int]
    PREFILL_DURATION_FIELD_NUMBER: _ClassVar[int]
    ENCODING_DURATION_FIELD_NUMBER: _ClassVar[int]
    queue_duration: _duration_pb2.Duration
    encode_duration: _duration_pb2.Duration
    decode_duration: _duration_pb2.Duration
    pixel_duration: _duration_pb2.Duration
    total_duration: _duration_pb2.Duration
    step_count: int
    ranking_duration: _duration_pb2.Duration
    prefill_duration: _duration_pb2.Duration
    encoding_duration: _duration_pb2.Duration
    def __init__(self, queue_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., encode_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., decode_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., pixel_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., total_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., step_count: _Optional[int] = ..., ranking_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., prefill_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., encoding_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Sample(_message.Message):
    __slots__ = ("sample_index", "score", "frame")
    SAMPLE_INDEX_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    sample_index: int
    score: float
    frame: Frame
    def __init__(self, sample_index: _Optional[int] = ..., score: _Optional[float] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ...) -> None: ...

class SampleScore(_message.Message):
    __slots__ = ("sample_index", "score")
    SAMPLE_INDEX_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    sample_index: int
    score: float
    def __init__(self, sample_index: _Optional[int] = ..., score: _Optional[float] = ...) -> None: ...

class GenerateImageRequest(_message.Message):
    __slots__ = ("request_id", "task", "prompt", "sketch", "image", "mask", "sampling", "output", "schedule", "sample_count", "rank_by", "return_count", "model")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SKETCH_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_COUNT_FIELD_NUMBER: _ClassVar[int]
    RANK_BY_FIELD_NUMBER: _ClassVar[int]
    RETURN_COUNT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    task: Task
    prompt: str
    sketch: Media
    image: Media
    mask: Mask
    sampling: Sampling
    output: Output
    schedule: Schedule
    sample_count: int
    rank_by: str
    return_count: int
    model: str
    def __init__(self, request_id: _Optional[str] = ..., task: _Optional[_Union[Task, str]] = ..., prompt: _Optional[str] = ..., sketch: _Optional[_Union[Media, _Mapping]] = ..., image: _Optional[_Union[Media, _Mapping]] = ..., mask: _Optional[_Union[Mask, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., output: _Optional[_Union[Output, _Mapping]] = ..., schedule: _Optional[_Union[Schedule, str]] = ..., sample_count: _Optional[int] = ..., rank_by: _Optional[str] = ..., return_count: _Optional[int] = ..., model: _Optional[str] = ...) -> None: ...

class GenerateImageResponse(_message.Message):
    __slots__ = ("request_id", "frame", "seed", "timings", "samples", "scores")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    frame: Frame
    seed: int
    timings: Timings
    samples: _containers.RepeatedCompositeFieldContainer[Sample]
    scores: _containers.RepeatedCompositeFieldContainer[SampleScore]
    def __init__(self, request_id: _Optional[str] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ..., seed: _Optional[int] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., samples: _Optional[_Iterable[_Union[Sample, _Mapping]]] = ..., scores: _Optional[_Iterable[_Union[SampleScore, _Mapping]]] = ...) -> None: ...

class StreamImageRequest(_message.Message):
    __slots__ = ("image", "preview_count")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_COUNT_FIELD_NUMBER: _ClassVar[int]
    image: GenerateImageRequest
    preview_count: int
    def __init__(self, image: _Optional[_Union[GenerateImageRequest, _Mapping]] = ..., preview_count: _Optional[int] = ...) -> None: ...

class StreamImageResponse(_message.Message):
    __slots__ = ("accepted", "progress", "preview", "sample", "done")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    accepted: AcceptedEvent
    progress: ProgressEvent
    preview: PreviewEvent
    sample: Sample
    done: ImageDoneEvent
    def __init__(self, accepted: _Optional[_Union[AcceptedEvent, _Mapping]] = ..., progress: _Optional[_Union[ProgressEvent, _Mapping]] = ..., preview: _Optional[_Union[PreviewEvent, _Mapping]] = ..., sample: _Optional[_Union[Sample, _Mapping]] = ..., done: _Optional[_Union[ImageDoneEvent, _Mapping]] = ...) -> None: ...

class ImageDoneEvent(_message.Message):
    __slots__ = ("request_id", "seed", "timings", "sample_index", "scores")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_INDEX_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    seed: int
    timings: Timings
    sample_index: int
    scores: _containers.RepeatedCompositeFieldContainer[SampleScore]
    def __init__(self, request_id: _Optional[str] = ..., seed: _Optional[int] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., sample_index: _Optional[int] = ..., scores: _Optional[_Iterable[_Union[SampleScore, _Mapping]]] = ...) -> None: ...

class PreviewEvent(_message.Message):
    __slots__ = ("frame", "decoded_position_count", "sample_index")
    FRAME_FIELD_NUMBER: _ClassVar[int]
    DECODED_POSITION_COUNT_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_INDEX_FIELD_NUMBER: _ClassVar[int]
    frame: Frame
    decoded_position_count: int
    sample_index: int
    def __init__(self, frame: _Optional[_Union[Frame, _Mapping]] = ..., decoded_position_count: _Optional[int] = ..., sample_index: _Optional[int] = ...) -> None: ...

class GenerateVideoRequest(_message.Message):
    __slots__ = ("request_id", "task", "prompt", "sketch", "video", "mask", "frame_count", "sampling", "output", "schedule", "animation_format", "frames_per_second", "sample_count", "rank_by", "return_count", "model")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SKETCH_FIELD_NUMBER: _ClassVar[int]
    VIDEO_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    FRAME_COUNT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    ANIMATION_FORMAT_FIELD_NUMBER: _ClassVar[int]
    FRAMES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_COUNT_FIELD_NUMBER: _ClassVar[int]
    RANK_BY_FIELD_NUMBER: _ClassVar[int]
    RETURN_COUNT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    task: Task
    prompt: str
    sketch: Media
    video: Media
    mask: Mask
    frame_count: int
    sampling: Sampling
    output: Output
    schedule: Schedule
    animation_format: AnimationFormat
    frames_per_second: int
    sample_count: int
    rank_by: str
    return_count: int
    model: str
    def __init__(self, request_id: _Optional[str] = ..., task: _Optional[_Union[Task, str]] = ..., prompt: _Optional[str] = ..., sketch: _Optional[_Union[Media, _Mapping]] = ..., video: _Optional[_Union[Media, _Mapping]] = ..., mask: _Optional[_Union[Mask, _Mapping]] = ..., frame_count: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., output: _Optional[_Union[Output, _Mapping]] = ..., schedule: _Optional[_Union[Schedule, str]] = ..., animation_format: _Optional[_Union[AnimationFormat, str]] = ..., frames_per_second: _Optional[int] = ..., sample_count: _Optional[int] = ..., rank_by: _Optional[str] = ..., return_count: _Optional[int] = ..., model: _Optional[str] = ...) -> None: ...

class GenerateVideoResponse(_message.Message):
    __slots__ = ("accepted", "progress", "frame", "done", "animation")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    ANIMATION_FIELD_NUMBER: _ClassVar[int]
    accepted: AcceptedEvent
    progress: ProgressEvent
    frame: FrameEvent
    done: DoneEvent
    animation: AnimationEvent
    def __init__(self, accepted: _Optional[_Union[AcceptedEvent, _Mapping]] = ..., progress: _Optional[_Union[ProgressEvent, _Mapping]] = ..., frame: _Optional[_Union[FrameEvent, _Mapping]] = ..., done: _Optional[_Union[DoneEvent, _Mapping]] = ..., animation: _Optional[_Union[AnimationEvent, _Mapping]] = ...) -> None: ...

class AcceptedEvent(_message.Message):
    __slots__ = ("request_id", "seed", "frame_count", "queue_duration", "sample_index")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    FRAME_COUNT_FIELD_NUMBER: _ClassVar[int]
    QUEUE_DURATION_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_INDEX_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    seed: int
    frame_count: int
    queue_duration: _duration_pb2.Duration
    sample_index: int
    def __init__(self, request_id: _Optional[str] = ..., seed: _Optional[int] = ..., frame_count: _Optional[int] = ..., queue_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., sample_index: _Optional[int] = ...) -> None: ...

class ProgressEvent(_message.Message):
    __slots__ = ("decoded_position_count", "total_position_count", "decoded_frame_count", "total_frame_count", "sample_index")
    DECODED_POSITION_COUNT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_POSITION_COUNT_FIELD_NUMBER: _ClassVar[int]
    DECODED_FRAME_COUNT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FRAME_COUNT_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_INDEX_FIELD_NUMBER: _ClassVar[int]
    decoded_position_count: int
    total_position_count: int
    decoded_frame_count: int
    total_frame_count: int
    sample_index: int
    def __init__(self, decoded_position_count: _Optional[int] = ..., total_position_count: _Optional[int] = ..., decoded_frame_count: _Optional[int] = ..., total_frame_count: _Optional[int] = ..., sample_index: _Optional[int] = ...) -> None: ...

class FrameEvent(_message.Message):
    __slots__ = ("frame", "sample_index")
    FRAME_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_INDEX_FIELD_NUMBER: _ClassVar[int]
    frame: Frame
    sample_index: int
    def __init__(self, frame: _Optional[_Union[Frame, _Mapping]] = ..., sample_index: _Optional[int] = ...) -> None: ...

class AnimationEvent(_message.Message):
    __slots__ = ("data", "chunk_index", "chunk_count")
    DATA_FIELD_NUMBER: _ClassVar[int]
    CHUNK_INDEX_FIELD_NUMBER: _ClassVar[int]
    CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    chunk_index: int
    chunk_count: int
    def __init__(self, data: _Optional[bytes] = ..., chunk_index: _Optional[int] = ..., chunk_count: _Optional[int] = ...) -> None: ...

class DoneEvent(_message.Message):
    __slots__ = ("request_id", "seed", "timings", "animation", "animation_format", "sample_index", "scores")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    ANIMATION_FIELD_NUMBER: _ClassVar[int]
    ANIMATION_FORMAT_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_INDEX_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    seed: int
    timings: Timings
    animation: bytes
    animation_format: AnimationFormat
    sample_index: int
    scores: _containers.RepeatedCompositeFieldContainer[SampleScore]
    def __init__(self, request_id: _Optional[str] = ..., seed: _Optional[int] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., animation: _Optional[bytes] = ..., animation_format: _Optional[_Union[AnimationFormat, str]] = ..., sample_index: _Optional[int] = ..., scores: _Optional[_Iterable[_Union[SampleScore, _Mapping]]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class ReloadModelRequest(_message.Message):
    __slots__ = ("model", "keep_earlier")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    KEEP_EARLIER_FIELD_NUMBER: _ClassVar[int]
    model: str
    keep_earlier: bool
    def __init__(self, model: _Optional[str] = ..., keep_earlier: _Optional[bool] = ...) -> None: ...

class ReloadModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: Model
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ...) -> None: ...

class UnloadModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class UnloadModelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: Model
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "bundle_hash", "tasks", "height", "width", "max_frame_count", "codebook_size", "parameter_count", "precision", "license", "backend", "slot_count", "max_prediction_frame_count", "sketch_class_count", "sketch_palette", "rankers", "max_sample_count", "sampling_defaults", "version", "runs_on")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_HASH_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAME_COUNT_FIELD_NUMBER: _ClassVar[int]
    CODEBOOK_SIZE_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    LICENSE_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    SLOT_COUNT_FIELD_NUMBER: _ClassVar[int]
    MAX_PREDICTION_FRAME_COUNT_FIELD_NUMBER: _ClassVar[int]
    SKETCH_CLASS_COUNT_FIELD_NUMBER: _ClassVar[int]
    SKETCH_PALETTE_FIELD_NUMBER: _ClassVar[int]
    RANKERS_FIELD_NUMBER: _ClassVar[int]
    MAX_SAMPLE_COUNT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUNS_ON_FIELD_NUMBER: _ClassVar[int]
    name: str
    bundle_hash: str
    tasks: _containers.RepeatedScalarFieldContainer[Task]
    height: int
    width: int
    max_frame_count: int
    codebook_size: int
    parameter_count: int
    precision: str
    license: str
    backend: str
    slot_count: int
    max_prediction_frame_count: int
    sketch_class_count: int
    sketch_palette: bytes
    rankers: _containers.RepeatedScalarFieldContainer[str]
    max_sample_count: int
    sampling_defaults: _containers.RepeatedCompositeFieldContainer[SamplingDefault]
    version: int
    runs_on: str
    def __init__(self, name: _Optional[str] = ..., bundle_hash: _Optional[str] = ..., tasks: _Optional[_Iterable[_Union[Task, str]]] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., max_frame_count: _Optional[int] = ..., codebook_size: _Optional[int] = ..., parameter_count: _Optional[int] = ..., precision: _Optional[str] = ..., license: _Optional[str] = ..., backend: _Optional[str] = ..., slot_count: _Optional[int] = ..., max_prediction_frame_count: _Optional[int] = ..., sketch_class_count: _Optional[int] = ..., sketch_palette: _Optional[bytes] = ..., rankers: _Optional[_Iterable[str]] = ..., max_sample_count: _Optional[int] = ..., sampling_defaults: _Optional[_Iterable[_Union[SamplingDefault, _Mapping]]] = ..., version: _Optional[int] = ..., runs_on: _Optional[str] = ...) -> None: ...

class SamplingDefault(_message.Message):
    __slots__ = ("task", "sampling")
    TASK_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    task: Task
    sampling: Sampling
    def __init__(self, task: _Optional[_Union[Task, str]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ...) -> None: ...
