"""The cache of generated code: machine code outlives the text, and a folder nobody may write."""

from __future__ import annotations

import pytest

from mlip.ops.cpu import cache

TEXT = """
from numba import njit
@njit(cache=True)
def twice(x):
    return 2 * x
"""


@pytest.fixture(autouse=True)
def _nothing_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("MLIP_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_loaded", {})


def test_machine_code_is_found_again_when_the_text_is_written_anew():
    """As by a second process that lost the race for the text."""
    first = cache.load("probe", TEXT)
    assert first.twice(3) == 6
    assert first.twice.stats.cache_misses
    (text,) = cache.cache_folder().glob("mlip_probe*.py")
    time = text.stat().st_mtime
    text.unlink()
    cache._loaded.clear()
    again = cache.load("probe", TEXT).twice
    assert again(4) == 8
    assert again.stats.cache_hits
    assert not again.stats.cache_misses
    assert text.stat().st_mtime == time  # older versions of Numba compare no more than this


def test_other_text_is_another_module():
    assert cache.load("probe", TEXT).twice(1) == 2
    assert cache.load("probe", TEXT.replace("2 *", "3 *")).twice(1) == 3
    assert len(list(cache.cache_folder().glob("mlip_probe*.py"))) == 2


def test_a_folder_that_cannot_be_made_costs_only_time(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MLIP_CACHE", str(tmp_path / "file"))
    assert cache.load("probe", TEXT).twice(5) == 10
    assert (tmp_path / "file").read_text() == "in the way"


PIECES = """
from mlip.ops.cpu.jit import compiled, piece
@piece
def half(x):
    return x / 2
@compiled
def quarter(x):
    return half(half(x))
"""


def test_pieces_are_compiled_with_what_calls_them_alone():
    """By itself it would take time, and that code would never be called."""
    module = cache.load("probe", PIECES)
    assert module.quarter(8.0) == 2.0
    assert not module.half.signatures
    (machine_code,) = cache.cache_folder().glob("__pycache__/*.nbc")
    assert "quarter" in machine_code.name
