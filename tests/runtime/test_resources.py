"""Machine limits, state memory, the cache of mapped weights."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from llmx.runtime import LLM, OutOfMemoryError, ProviderError, RequestError, SamplingParams, load_manifest
from llmx.runtime import mapped_cache as cache_module
from llmx.runtime.machine import available_memory, cpu_fingerprint, cpu_quota, usable_cpus
from llmx.runtime.mapped_cache import COMPLETE, DATA_FILE, MappedCache
from llmx.runtime.providers import resolve_device
from llmx.runtime.sessions import SessionSettings, session_options
from llmx.runtime.state import StatePool, plan_state

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)


def test_cgroup_limits(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path) == 1.5
    assert usable_cpus(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert cpu_quota(tmp_path) == 0.5
    assert usable_cpus(tmp_path) == 1
    (tmp_path / "memory.max").write_text("1000000")
    (tmp_path / "memory.current").write_text("400000")
    assert available_memory(tmp_path) == 600000
    (tmp_path / "memory.stat").write_text("anon 100000\nfile 300000\ninactive_file 250000\n")
    assert available_memory(tmp_path) == 850000  # page cache that the kernel gives back counts as free
    v1 = tmp_path / "memory"
    v1.mkdir()
    (v1 / "memory.limit_in_bytes").write_text("500000")
    (v1 / "memory.usage_in_bytes").write_text("450000")
    (v1 / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 200000\n")
    assert available_memory(tmp_path) == 250000
    assert len(cpu_fingerprint()) == 16


def test_devices() -> None:
    assert resolve_device("auto").kind == resolve_device("cpu").kind == "cpu"
    for bad in ("gpu", "cuda:x", "", "cpu:0"):
        with pytest.raises(RequestError, match="device must be"):
            resolve_device(bad)
    with pytest.raises(ProviderError, match="no CUDA provider"):
        resolve_device("cuda:1")


def test_state_plan(demo: Path) -> None:
    manifest = load_manifest(demo)
    per_token = manifest.state_bytes_per_token()
    assert plan_state(manifest, None, 1, free=10**12).max_length == 1024
    assert plan_state(manifest, None, 4, free=per_token * 4 * 200).max_length == 100  # half of what is free
    assert plan_state(manifest, None, 4, free=per_token * 4 * 200 + 10**9, weights=10**9).max_length == 100
    with pytest.raises(OutOfMemoryError, match=r"weights take 2\.00 GB and 1\.00 GB are free"):
        plan_state(manifest, None, 4, free=10**9, weights=2 * 10**9)
    with pytest.raises(OutOfMemoryError, match="max_length 50 or slots 2 would fit"):
        plan_state(manifest, 100, 4, free=per_token * 200)
    for length in (1, 1025):
        with pytest.raises(RequestError, match="between 2 and the package's context of 1024"):
            plan_state(manifest, length, 1)
    with pytest.raises(RequestError, match="slots must be"):
        plan_state(manifest, 10, 0)


def test_state_pool_shares_memory_and_copies_slots(demo: Path) -> None:
    pool = StatePool(load_manifest(demo), plan_state(load_manifest(demo), 16, 3))
    pool.check_integrity()
    for view in pool.rows(1, 1):
        view[...] = 7
    assert all((view[1] == 7).all() and (view[0] == 0).all() for view in pool.rows(0, 3))
    pool.copy_slot(1, 2, 5)
    assert all((view[2, :, :5] == 7).all() and (view[2, :, 5:] == 0).all() for view in pool.rows(0, 3))


def test_prefill_into_one_slot_leaves_others(demo: Path) -> None:
    with LLM(demo, slots=2, max_length=64) as llm:
        llm.backend.prefill(0, np.arange(1, 9), 0, np.array([7]))
        before = [v.copy() for v in llm.backend._state.rows(0, 1)]  # type: ignore[attr-defined]
        llm.backend.prefill(1, np.arange(9, 20), 0, np.array([1]))
        after = llm.backend._state.rows(0, 1)  # type: ignore[attr-defined]
        assert all((a == b).all() for a, b in zip(before, after, strict=True))
        assert all((v[0, :, :8] != 0).any() for v in after)


# -- mapped weights ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_packages_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cache_module, "MIN_WEIGHTS", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def tokens(package: Path, cache: Path | None) -> list[int]:
    with LLM(package, slots=1, mapped_cache=cache is not None, cache_dir=cache) as llm:
        return llm.generate("ROMEO:", GREEDY)[0].outputs[0].token_ids


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "prepacked").iterdir())


@pytest.mark.usefixtures("small_packages_too")
def test_cached_weights_give_the_same_tokens_from_one_file(demo: Path, tmp_path: Path) -> None:
    expected = tokens(demo, None)
    assert tokens(demo, tmp_path) == expected
    [entry] = entries(tmp_path)
    assert {p.name for p in entry.iterdir()} == {"prefill.onnx", "decode.onnx", DATA_FILE, COMPLETE}
    assert tokens(demo, tmp_path) == expected


@pytest.mark.usefixtures("small_packages_too")
def test_damaged_entries_are_rebuilt(demo: Path, tmp_path: Path) -> None:
    expected = tokens(demo, tmp_path)
    [entry] = entries(tmp_path)
    (entry / DATA_FILE).write_bytes(b"short")
    assert tokens(demo, tmp_path) == expected
    assert (entry / DATA_FILE).stat().st_size > 1000
    (entry / COMPLETE).unlink()
    assert tokens(demo, tmp_path) == expected


@pytest.mark.usefixtures("small_packages_too")
def test_old_entries_are_evicted(demo: Path, tmp_path: Path) -> None:
    manifest = load_manifest(demo)
    cache = MappedCache(tmp_path, bound=1)
    old = cache.folder / "old"
    old.mkdir(parents=True)
    (old / COMPLETE).write_text("")
    assert cache.get(demo, manifest, lambda: session_options(SessionSettings())) is not None
    assert not old.exists()


def test_unwritable_cache_costs_memory_not_the_run(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MIN_WEIGHTS", 0)
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="could not be written"):
        assert tokens(demo, tmp_path / "file") == tokens(demo, None)


def _open(package: str, cache: str, answers: object) -> None:
    cache_module.MIN_WEIGHTS = 0
    answers.put(tokens(Path(package), Path(cache)))  # type: ignore[attr-defined]


def test_two_processes_build_at_once(demo: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    children = [context.Process(target=_open, args=(str(demo), str(tmp_path), answers)) for _ in range(2)]
    for child in children:
        child.start()
    got = [answers.get(timeout=90) for _ in children]
    for child in children:
        child.join(20)
    assert got[0] == got[1] == tokens(demo, None)
    assert len(entries(tmp_path)) == 1


def test_cache_key_depends_on_the_weights(demo: Path, tmp_path: Path) -> None:
    shutil.copytree(demo, tmp_path / "copy")
    manifest = json.loads((tmp_path / "copy" / "llmx.json").read_text())
    manifest["files"]["weights.data"]["sha256"] = "0" * 64
    (tmp_path / "copy" / "llmx.json").write_text(json.dumps(manifest))
    cache = MappedCache(tmp_path)
    assert cache.key(load_manifest(demo)) != cache.key(load_manifest(tmp_path / "copy", check_sizes=False))
