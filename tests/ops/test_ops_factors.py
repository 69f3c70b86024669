"""Low-rank factors: how exact they are, where they come from, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlip.errors import DataError, InputError
from mlip.ops.tensor_products import (
    EXACT_RANK,
    equivariance_error,
    find_factors,
    load_factors,
    published_rank,
    save_factors,
)
from mlip.ops.tensor_products.solver import decompose, reconstruct


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep the factors of the tests out of the user's cache."""
    monkeypatch.setenv("MLIP_CACHE", str(tmp_path))
    find_factors.cache_clear()
    yield tmp_path / "factors"
    find_factors.cache_clear()


@pytest.mark.parametrize("lmax", [0, 1, 2, 3])
def test_exact_ranks_give_the_exact_tensor(lmax):
    factors = find_factors(lmax, EXACT_RANK[lmax])
    assert factors.error < 1e-12
    assert equivariance_error(factors) < 1e-12
    assert max(float(f.abs().max()) for f in factors) < 10  # no cancellation of large terms


@pytest.mark.parametrize(
    ("lmax", "rank", "starts", "limit"),
    [(1, 6, 2, 0.30), (1, 7, 4, 0.017), (2, 15, 1, 0.42), (2, 28, 1, 0.018), (3, 63, 1, 0.06)],
)
def test_lower_ranks_are_approximations(lmax, rank, starts, limit):
    """One start of a few; the best of many is in the table of docs/tdn.md."""
    factors = find_factors(lmax, rank, starts=starts)
    assert 1e-3 < factors.error < limit
    assert factors.error / 3 < equivariance_error(factors) < 3 * factors.error


def test_any_tensor_of_low_rank_is_recovered():
    generator = torch.Generator().manual_seed(4)
    factors = tuple(
        torch.randn(size, 4, generator=generator, dtype=torch.float64) for size in (5, 6, 7)
    )
    tensor = reconstruct(factors)
    found = decompose(tensor, 4, seed=1, starts=3)
    assert found.error < 1e-12
    torch.testing.assert_close(reconstruct(found.factors), tensor, rtol=0, atol=1e-10)


def test_equal_seeds_give_equal_factors():
    tensor = find_factors(1, 8).tensor
    first, again, other = (decompose(tensor, 8, seed=seed).factors for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_factors_are_kept_on_disk_and_replaced_when_damaged(cache):
    factors = find_factors(1, 8)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    find_factors.cache_clear()
    again = find_factors(1, 8)
    assert all(torch.equal(a, b) for a, b in zip(factors, again, strict=True))
    find_factors.cache_clear()
    file.chmod(0o444)
    assert torch.equal(find_factors(1, 8).out, factors.out)


def test_import_of_every_format(tmp_path):
    factors = find_factors(1, 8)
    named = dict(zip(("cp_a", "cp_b", "cp_c"), factors, strict=True))
    save_factors(tmp_path / "f.safetensors", factors)
    np.savez(tmp_path / "f.npz", **{name: f.numpy() for name, f in named.items()})
    torch.save(
        {name: torch.nn.Parameter(f.float()) for name, f in named.items()}, tmp_path / "f.pt"
    )
    for suffix, tolerance in ((".safetensors", 0), (".npz", 0), (".pt", 1e-6)):
        loaded = load_factors(tmp_path / f"f{suffix}")
        assert (loaded.lmax, loaded.rank) == (1, 8)
        for ours, theirs in zip(loaded, factors, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


class Bomb:
    """Would write a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_file_is_executed(tmp_path):
    torch.save({"cp_a": Bomb(tmp_path / "executed")}, tmp_path / "evil.pt")
    bombs = np.array([Bomb(tmp_path / "executed")], dtype=object)
    np.savez(tmp_path / "evil.npz", cp_a=bombs)
    for file in ("evil.pt", "evil.npz"):
        with pytest.raises(DataError, match=file):
            load_factors(tmp_path / file)
    assert not (tmp_path / "executed").exists()


def test_unusable_files_are_named(tmp_path):
    np.savez(tmp_path / "other.npz", cp_a=np.zeros((4, 7)))
    np.savez(tmp_path / "shape.npz", cp_a=np.zeros((4, 7)), cp_b=np.zeros((4, 7)), cp_c=np.eye(5))
    np.savez(tmp_path / "size.npz", **dict.fromkeys(("cp_a", "cp_b", "cp_c"), np.zeros((5, 7))))
    (tmp_path / "text.pt").write_text("no")
    torch.save([1], tmp_path / "list.pt")
    for file in ("other.npz", "shape.npz", "size.npz", "text.pt", "list.pt", "missing.safetensors"):
        with pytest.raises(DataError, match=file):
            load_factors(tmp_path / file)


def test_ranks_of_the_published_model():
    assert [published_rank(lmax) for lmax in (1, 2, 3, 4)] == [7, 28, 63, 112]
    assert (published_rank(2, "linear"), published_rank(2, "full")) == (14, 81)
    with pytest.raises(InputError, match="cubic"):
        published_rank(2, "cubic")
    with pytest.raises(InputError, match="rank 0"):
        find_factors(1, 0)
    with pytest.raises(InputError, match="lmax"):
        find_factors(-1, 3)
