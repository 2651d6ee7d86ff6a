"""Whisper: features beside transformers' own, transcripts beside `generate`, files of every PCM width."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmx.export import ExportOptions, export_model
from llmx.runtime import LLM, FamilyError, MissingDependencyError, RequestError, SamplingParams
from llmx.runtime.audio import load_audio, log_mel
from llmx.runtime.errors import UnsupportedModelError
from llmx.runtime.manifest import AudioInfo
from zoo.models import VOCAB, save_checkpoint, widen

RATE = 16000
START, NO_TIMESTAMPS = 257, 264
LANGUAGES = {"<|en|>": 258, "<|de|>": 259, "<|fr|>": 260}
TASKS = {"translate": 261, "transcribe": 262}
INFO = AudioInfo(RATE, 400, 160, 80, 30)


def speech(seconds: float, seed: int) -> np.ndarray:
    """float32 mono: chirps under an envelope, and noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * RATE)) / RATE
    chirp = np.sin(2 * np.pi * (150 + 90 * seed + 400 * np.sin(1.3 * t)) * t) * (0.5 + 0.5 * np.sin(5 * t))
    return (0.4 * chirp + 0.02 * rng.standard_normal(len(t))).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCAB, d_model=48, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_target_positions=64, num_mel_bins=80,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, decoder_start_token_id=START, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).eval()
    positions = model.model.encoder.embed_positions.weight.clone()
    widen(model, 0)
    with torch.no_grad():
        model.model.encoder.embed_positions.weight.copy_(positions)
    settings = model.generation_config
    settings.lang_to_id, settings.task_to_id, settings.no_timestamps_token_id = LANGUAGES, TASKS, NO_TIMESTAMPS
    settings.is_multilingual, settings.decoder_start_token_id = True, START
    settings.suppress_tokens, settings.begin_suppress_tokens = [3, 4, 5, START, NO_TIMESTAMPS], [0, 7]
    settings.eos_token_id = settings.pad_token_id = 0
    settings.max_length, settings._from_model_config = 64, False  # else what only Whisper has is not read back
    return model


@pytest.fixture(scope="module")
def package(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import WhisperFeatureExtractor

    work = tmp_path_factory.mktemp("whisper")
    save_checkpoint(model, work / "checkpoint")
    WhisperFeatureExtractor().save_pretrained(work / "checkpoint")
    return export_model(ExportOptions(str(work / "checkpoint"), work / "package")).path


@pytest.mark.parametrize("seconds", [0.3, 7.0, 30.0, 41.0])
def test_features_equal_transformers(seconds: float) -> None:
    from transformers import WhisperFeatureExtractor

    sound = speech(seconds, 1)
    extractor = WhisperFeatureExtractor()
    expected = extractor(sound, sampling_rate=RATE, return_tensors="np").input_features[0]
    got = log_mel(sound, INFO)
    assert got.shape == expected.shape == (80, 3000)
    np.testing.assert_allclose(got, expected, atol=2e-4)
    exact = extractor._np_extract_fbank_features(np.pad(sound, (0, max(0, 480000 - len(sound))))[None, :480000], "cpu")
    np.testing.assert_allclose(got, exact[0], atol=1e-5)


def test_features_of_128_mels() -> None:
    from transformers import WhisperFeatureExtractor

    expected = WhisperFeatureExtractor(feature_size=128)._np_extract_fbank_features(
        np.pad(speech(3, 2), (0, 27 * RATE))[None], "cpu"
    )
    np.testing.assert_allclose(log_mel(speech(3, 2), AudioInfo(RATE, 400, 160, 128, 30)), expected[0], atol=1e-5)


@pytest.mark.parametrize(("language", "task"), [("en", "transcribe"), ("de", "translate"), (None, "transcribe")])
def test_transcripts_equal_generate(model: Any, package: Path, language: str | None, task: str) -> None:
    with LLM(package, slots=2) as llm:
        assert {t.layout for t in llm.manifest.state} == {"grow", "cross"}
        for seed, seconds in ((1, 5.0), (2, 28.0)):
            sound = speech(seconds, seed)
            features = torch.tensor(log_mel(sound, INFO))[None]
            with torch.no_grad():
                expected = model.generate(features, language=language, task=task, max_new_tokens=24, do_sample=False)
            got = llm.transcribe(sound, SamplingParams(max_tokens=24), language=language, task=task)
            [output] = got.outputs
            tokens = expected[0].tolist()
            start = tokens[:4] if tokens[0] == START else []
            assert output.outputs[0].token_ids == tokens[len(start) :]
            assert got.text == llm.tokenizer.decode(output.outputs[0].token_ids).strip()
            if start:
                assert start[1] == LANGUAGES[f"<|{got.language}|>"]


def test_long_sound_is_cut_into_windows(package: Path) -> None:
    sound = speech(47.0, 3)
    params = SamplingParams(max_tokens=8)
    with LLM(package, slots=2) as llm:
        whole = llm.transcribe(sound, params, language="fr")
        parts = [llm.transcribe(piece, params, language="fr") for piece in (sound[: 30 * RATE], sound[30 * RATE :])]
    assert len(whole.outputs) == 2
    assert whole.text == " ".join(part.text for part in parts if part.text)


def write_wav(file: Path, samples: np.ndarray, width: int, channels: int = 1, rate: int = RATE) -> Path:
    scale = 2 ** (8 * width - 1) - 1
    numbers = np.round(np.repeat(samples, channels) * scale).astype(np.int64)
    raw = b"".join(int(n + (128 if width == 1 else 0)).to_bytes(width, "little", signed=width > 1) for n in numbers)
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(width)
        sound.setframerate(rate)
        sound.writeframes(raw)
    return file


@pytest.mark.parametrize(("width", "channels"), [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2)])
def test_wav_files(tmp_path: Path, width: int, channels: int) -> None:
    sound = speech(0.2, 4)
    loaded = load_audio(write_wav(tmp_path / "a.wav", sound, width, channels), RATE)
    np.testing.assert_allclose(loaded, sound, atol=2.0 ** (2 - 8 * width) + 1e-6)


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_other_rates_are_resampled(tmp_path: Path, rate: int) -> None:
    times = np.arange(rate) / rate
    tone = (0.5 * np.sin(2 * np.pi * 440 * times)).astype(np.float32)
    loaded = load_audio(write_wav(tmp_path / "tone.wav", tone, 2, 2, rate), RATE)
    assert abs(len(loaded) - RATE) <= 1
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(loaded)) / RATE)
    np.testing.assert_allclose(loaded[400:-400], expected[400:-400], atol=2e-3)  # filters ring at the ends


def test_bad_sound(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = write_wav(tmp_path / "sound.wav", speech(0.1, 5), 2).read_bytes()
    bad = {  # of no format, nothing at all, cut within its head, of no samples a second, of 64 bits
        "no": b"RIFFnothing", "none": b"", "cut": sound[:30], "rate": sound[:24] + bytes(4) + sound[28:],
        "wide": sound[:32] + bytes([8, 0, 64, 0]) + sound[36:],
    }  # fmt: skip
    for name, content in bad.items():
        (tmp_path / f"{name}.wav").write_bytes(content)
    other = write_wav(tmp_path / "8k.wav", speech(0.1, 5), 2, rate=8000)
    empty = write_wav(tmp_path / "empty.wav", speech(0, 5), 2)
    monkeypatch.setitem(sys.modules, "soxr", None)
    with LLM(package) as llm:
        for name in bad:
            with pytest.raises(RequestError, match=r"as a PCM WAV file \(.+\); convert it: ffmpeg"):
                llm.transcribe(tmp_path / f"{name}.wav")
        with pytest.raises(RequestError, match="There is no file"):
            llm.transcribe(tmp_path / "missing.wav")
        with pytest.raises(MissingDependencyError, match=r"8000 samples a second.*llmx\[audio\]"):
            llm.transcribe(other)
        with pytest.raises(RequestError, match="empty"):
            llm.transcribe(empty)
        with pytest.raises(RequestError, match=r"language 'xx'; it knows de, en, fr"):
            llm.transcribe(speech(1, 1), language="xx")
        with pytest.raises(RequestError, match="task must be one of"):
            llm.transcribe(speech(1, 1), language="en", task="sing")
        with pytest.raises(RequestError, match="not finite"):
            llm.transcribe(np.array([np.nan], np.float32))
        with pytest.raises(FamilyError, match="--audio"):
            llm.generate("x")
        with pytest.raises(FamilyError, match="does not embed; use `llmx run --audio"):
            llm.embed("x")
        llm.warmup()


def test_text_packages_take_no_sound(demo: Path) -> None:
    with LLM(demo) as llm, pytest.raises(FamilyError, match="no speech model"):
        llm.transcribe(speech(1, 1))


def test_another_feature_extractor_is_refused(model: Any, tmp_path: Path) -> None:
    save_checkpoint(model, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "preprocessor_config.json").write_text('{"feature_extractor_type": "OtherExtractor"}')
    with pytest.raises(UnsupportedModelError, match="OtherExtractor"):
        export_model(ExportOptions(str(tmp_path / "checkpoint"), tmp_path / "package"))
    assert not (tmp_path / "package").exists()


def test_from_the_command_line(package: Path, tmp_path: Path) -> None:
    file = write_wav(tmp_path / "speech.wav", speech(2.0, 6), 2)
    command = [sys.executable, "-m", "llmx.cli", "run", "--onnx", str(package), "--audio", str(file), "-n", "8"]
    out = json.loads(subprocess.run([*command, "--json"], check=True, capture_output=True, text=True).stdout)
    with LLM(package) as llm:
        direct = llm.transcribe(file, SamplingParams(max_tokens=8))
    assert out == {"text": direct.text, "language": direct.language, "windows": 1}
    both = subprocess.run([*command, "--prompt", "x"], capture_output=True, text=True)
    assert both.returncode == 2
    assert "not both" in both.stderr


def test_bench_measures_a_window_of_sound(package: Path) -> None:
    from click.testing import CliRunner
    from llmx.cli import main

    arguments = ["bench", "--onnx", str(package), "-n", "3", "-r", "1", "--warmup", "0", "--batch-size", "2", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    [point] = report["points"]
    assert point["prompt"] == 1500  # positions of the encoder, whatever -p says
    assert point["prefill_tokens_per_s"]["median"] > 0 and point["decode_tokens_per_s"]["median"] > 0
    assert report["cold_start"] == {}


#: A weight -> the layer that an altered one is found in, and the half of the model.
PARTS = {
    "model.encoder.layers.1.fc2.weight": (1, "the encoder's layer 1 of 0 … 1"),
    "model.decoder.layers.1.encoder_attn.v_proj.weight": (1, "the decoder's layer 1 of 0 … 2"),
}


def test_verify_runs_freely_and_finds_the_layer(package: Path, tmp_path: Path) -> None:
    """Windows of random features, tokens suppressed as the package says; an altered weight is named by its layer."""
    from click.testing import CliRunner
    from llmx.cli import main
    from safetensors.torch import load_file, save_file

    def report(source: Path, code: int) -> dict[str, Any]:
        command = ["verify", "--onnx", str(package), "--model", str(source), "--prompts", "2", "--json"]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == code, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    source = package.parent / "checkpoint"
    good = report(source, 0)
    assert good["passed"] and good["family"] == "encoder-decoder" and good["layer"] is None
    assert good["generation"]["agreement"] == 1 and good["generation"]["identical_rows"] == 2
    assert 0 < good["outputs"]["max_abs_diff"] < good["outputs"]["allowed"]
    for index, (weight, (layer, words)) in enumerate(PARTS.items()):
        other = tmp_path / f"other{index}"
        shutil.copytree(source, other)
        tensors = load_file(other / "model.safetensors")
        tensors[weight] = tensors[weight] * 1.1 + 0.01
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
        bad = report(other, 1)
        assert bad["layer"] == layer and words in bad["parting"], bad["parting"]
        assert "Logits differ" in bad["reason"]
