"""Feature extractors as functions of sounds. ModelError names the file if one fails, or if the model cannot read its
output; DataError a sound that is too long."""

from __future__ import annotations

from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from epmq_cli.data.batching import Batch, Collate
from epmq_cli.data.sounds import Sound
from epmq_cli.errors import DataError, ModelError, first_line, lacks_memory
from epmq_cli.families.processors import image_file, own
from epmq_cli.models.pretrained import config_of
from epmq_cli.models.processor_folder import Processor
from epmq_cli.quantize.linalg import is_finite

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STRIDE = 2  # frames of features that one token of Whisper's encoder reads


def own_extractor(folder: Path, processor: Processor | None = None) -> Any:
    """The feature extractor of a folder."""
    from transformers import AutoFeatureExtractor

    return own(AutoFeatureExtractor, folder, processor)


def resampled(sound: Sound, rate: int) -> NDArray[np.float32]:
    """The values of a sound at another rate, by a polyphase filter."""
    if sound.rate == rate:
        return sound.values
    from scipy.signal import resample_poly

    common = gcd(sound.rate, rate)
    values: NDArray[np.float32] = resample_poly(sound.values, rate // common, sound.rate // common)
    return values.astype(sound.values.dtype)


def sounds(folder: Path, processor: Processor | None = None) -> Collate:
    """A feature extractor as a function from sounds to batches. `processor`: its place, if not `folder`."""
    extractor, config = own_extractor(folder, processor), config_of(folder)
    file = image_file(processor.folder if processor else folder)
    shape = (config.num_mel_bins, STRIDE * config.max_source_positions)
    rate, most = extractor.sampling_rate, extractor.n_samples

    def values_of(sound: Sound) -> NDArray[np.float32]:
        values = resampled(sound, rate)
        if len(values) > most:
            raise DataError(
                f"{sound.where} lasts {len(values) / rate:.1f} s, and the model reads {most / rate:g} s at a time; cut "
                "it, or remove it"
            )
        return values

    def collate(samples: list[Any]) -> Batch:
        values = [values_of(sound) for sound in samples]
        try:
            output = extractor(values, sampling_rate=rate, return_tensors="pt")
            features = torch.as_tensor(output["input_features"])
        except Exception as error:
            if lacks_memory(error):
                raise
            raise ModelError(f"{file} fails on a sound ({first_line(error)}); fetch it again") from error
        if features.shape[1:] != shape:
            raise ModelError(
                f"{file} makes features of {list(features.shape[1:])}, and the model reads {list(shape)}; set "
                "feature_size and chunk_length to that"
            )
        if not is_finite(features):
            raise ModelError(f"{file} makes features that are NaN or infinite; fetch it again")
        return {"input_features": features}

    return collate
