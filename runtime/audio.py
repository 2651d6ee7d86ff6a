"""Sound to log-mel features, in numpy: what Whisper's encoder reads.

Source: Radford et al. 2022 (arXiv:2212.04356), section 2.2; filters as librosa's "slaney" scale, which the published
models were trained with.
"""

from __future__ import annotations

import functools
import wave
from pathlib import Path

import numpy as np
from llmx.runtime.errors import MissingDependencyError, RequestError
from llmx.runtime.manifest import AudioInfo

_MAX_FREQUENCY = 8000.0
_FLOOR = 1e-10


def load_audio(file: str | Path, sampling_rate: int) -> np.ndarray:
    """A WAV file (PCM of 8, 16, 24 or 32 bits) as mono float32 [samples] in -1 … 1 at `sampling_rate` Hz.

    Raises RequestError where the file cannot be read, MissingDependencyError where it has another rate and soxr is missing.
    """
    try:
        with wave.open(str(file), "rb") as sound:
            channels, width, rate = sound.getnchannels(), sound.getsampwidth(), sound.getframerate()
            raw = sound.readframes(sound.getnframes())
        if not (rate > 0 and width <= 4):
            raise wave.Error(f"{rate} samples a second of {8 * width} bits")
    except FileNotFoundError:
        raise RequestError(f"There is no file {file} (the sound to transcribe).") from None
    except (OSError, EOFError, wave.Error) as error:
        raise RequestError(
            f"{file} cannot be read as a PCM WAV file ({str(error) or 'it ends too early'}); convert it: "
            f"ffmpeg -i {file} -ar {sampling_rate} -ac 1 out.wav"
        ) from None
    samples = _samples(raw[: len(raw) - len(raw) % (width * channels)], width)
    return resample(samples.reshape(-1, channels).mean(axis=1), rate, sampling_rate)


def _samples(raw: bytes, width: int) -> np.ndarray:
    """float32 in -1 … 1 of little-endian PCM; 8 bits are unsigned (the WAV format's rule)."""
    if width == 1:
        return (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / 128
    if width == 3:
        parts = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        padded = np.concatenate([np.zeros((len(parts), 1), np.uint8), parts], axis=1)
        return padded.reshape(-1).view("<i4").astype(np.float32) / 2**31
    return np.frombuffer(raw, {2: "<i2", 4: "<i4"}[width]).astype(np.float32) / float(2 ** (8 * width - 1))


def resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """float32 [samples] at `rate` Hz as float32 at `wanted` Hz. Raises MissingDependencyError without soxr."""
    if rate == wanted:
        return samples.astype(np.float32)
    try:
        import soxr
    except ImportError:
        raise MissingDependencyError(
            f'The sound has {rate} samples a second and the model takes {wanted}: pip install "llmx[audio]" resamples it.'
        ) from None
    resampled: np.ndarray = soxr.resample(samples.astype(np.float32), rate, wanted)
    return resampled


def log_mel(samples: np.ndarray, info: AudioInfo) -> np.ndarray:
    """float32 [n_mels, frames] of up to `chunk_seconds` of mono sound, silence after its end."""
    length = info.chunk_seconds * info.sampling_rate
    padded = np.zeros(length, np.float64)
    padded[: min(length, len(samples))] = samples[:length]
    padded = np.pad(padded, info.n_fft // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, info.n_fft)[:: info.hop_length]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(info.n_fft) / info.n_fft)
    power = np.abs(np.fft.rfft(frames * window, axis=1)) ** 2
    mel = np.log10(np.maximum(_FLOOR, mel_filters(info).T @ power[:-1].T))
    mel = np.maximum(mel, mel.max() - 8.0)
    features: np.ndarray = ((mel + 4.0) / 4.0).astype(np.float32)
    return features


def mel_filters(info: AudioInfo) -> np.ndarray:
    """float64 [n_fft / 2 + 1, n_mels]: triangles of equal area on the slaney mel scale."""
    return _mel_filters(info.n_fft, info.n_mels, info.sampling_rate)


@functools.cache
def _mel_filters(n_fft: int, n_mels: int, sampling_rate: int) -> np.ndarray:
    edges = _hertz(np.linspace(0.0, _mel(_MAX_FREQUENCY), n_mels + 2))
    bins = np.linspace(0, sampling_rate // 2, 1 + n_fft // 2)
    rising = (bins[:, None] - edges[None, :-2]) / np.diff(edges)[:-1]
    falling = (edges[None, 2:] - bins[:, None]) / np.diff(edges)[1:]
    filters: np.ndarray = np.maximum(0, np.minimum(rising, falling)) * (2.0 / (edges[2:] - edges[:-2]))
    return filters


_LINEAR_UP_TO = 1000.0  # hertz: below, the slaney scale is linear (3 mel for 200 Hz), above logarithmic
_STEP = np.log(6.4) / 27.0


def _mel(hertz: float) -> float:
    return 3.0 * hertz / 200.0 if hertz < _LINEAR_UP_TO else 15.0 + float(np.log(hertz / _LINEAR_UP_TO) / _STEP)


def _hertz(mels: np.ndarray) -> np.ndarray:
    high = _LINEAR_UP_TO * np.exp(_STEP * (np.maximum(mels, 15.0) - 15.0))
    hertz: np.ndarray = np.where(mels < 15.0, 200.0 * mels / 3.0, high)
    return hertz
