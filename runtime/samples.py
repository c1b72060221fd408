"""How many samples a request makes, what ranks them and how many it gets; all of it checked.

A pure function of the message, as conditions.py; errors name the field. Who counts, ranks and
returns them: scheduler.py, ranking.py and selection.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from nuwa.v1 import generation_pb2 as pb

from .core import GenerationRequest, ModelInfo
from .errors import FieldError

MAX_SAMPLES = 64
MAX_INDEX = 2**31 - 1  # of the protocol's int32
# Of all frames of all samples, in pixels of the model: what a ranking, or a reader that is slower
# than the decoder, may leave in memory. 400 MB; 64 samples of ten frames of 336 x 336 are half.
MAX_REQUEST_PIXELS = 2**27


@dataclass(frozen=True)
class Samples:
    """How many samples a request makes and gets. rank_by: a ranker's name, or "" for none."""

    count: int = 1
    returned: int = 1
    rank_by: str = ""

    @property
    def listed(self) -> bool:
        """Whether the answer lists samples; a plain request gets one image or clip and no list."""
        return self.count > 1 or bool(self.rank_by)


def read(
    message: pb.GenerateImageRequest | pb.GenerateVideoRequest,
    generation: GenerationRequest,
    info: ModelInfo,
) -> Samples:
    """The samples of a request whose other fields are `generation`. FieldError for a bad value."""
    count = message.sample_count if message.HasField("sample_count") else 1
    if not 1 <= count <= MAX_SAMPLES:
        raise FieldError("sample_count", f"sample_count {count} is not in [1, {MAX_SAMPLES}]")
    if generation.sample_index + count - 1 > MAX_INDEX:
        raise FieldError(
            "sampling.sample_index",
            f"{count} samples from sample_index {generation.sample_index} on go beyond {MAX_INDEX}",
        )
    _check_pixels(count, generation.frame_count + generation.previews, info)
    rank_by = message.rank_by
    if rank_by:
        _check_ranker(rank_by, generation, info)
    returned = 1 if rank_by else count
    if message.HasField("return_count"):
        returned = message.return_count
    if not 1 <= returned <= count:
        raise FieldError(
            "return_count", f"return_count {returned} is not in [1, {count}], the sample_count"
        )
    if returned < count and not rank_by:
        raise FieldError(
            "return_count",
            f"return_count {returned} of {count} samples needs rank_by to choose them",
        )
    return Samples(count, returned, rank_by)


def _check_pixels(count: int, frame_count: int, info: ModelInfo) -> None:
    pixels = count * frame_count * info.height * info.width
    if pixels > MAX_REQUEST_PIXELS:
        most = MAX_REQUEST_PIXELS // (info.height * info.width)
        raise FieldError(
            "sample_count" if count > 1 else "frame_count",
            f"{count} samples of {frame_count} frames are more than the {most} frames that a "
            "request may have; ask for fewer at a time",
        )


def _check_ranker(name: str, generation: GenerationRequest, info: ModelInfo) -> None:
    if name not in info.rankers:
        choices = ", ".join(info.rankers)
        there = f"choose one of {choices}" if choices else "there is none here"
        raise FieldError("rank_by", f"there is no ranker {name!r}; {there}")
    if not generation.prompt.strip():
        raise FieldError(
            "rank_by", "rank_by needs a prompt, which the samples are ranked by; there is none"
        )
