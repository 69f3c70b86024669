"""Widen a Facet potential without changing what it predicts, to train it further.

    python scripts/widen_potential.py mlearn-facet wide.safetensors --hidden 64,32,16 \\
        --message 48,48,32,32 --embedding 64 --outputs 64

Old channels keep their weights and hear nothing of new ones; new channels have new weights and hear
everything. All that follows is training: gradients by the weights from new to old channels are not
zero. After Net2Net (Chen, Goodfellow and Shlens, arXiv 1511.05641). Products on the sphere only.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mlip.errors import InputError
from mlip.models import create_model
from mlip.models.facet import Facet, FacetBlock
from mlip.models.facet_config import FacetConfig
from mlip.nn.equivariant import EquivariantLinear
from mlip.nn.node_update import SphereProductUpdate
from mlip.potential import Potential, load_potential

Places = list[int]  # of old channels among the new ones


def joined(old: Sequence[int], new: Sequence[int]) -> Places:
    """Give places where parts of ``old`` widths lie at the start of parts of ``new`` widths."""
    starts = [sum(new[:i]) for i in range(len(new))]
    return [start + i for start, n in zip(starts, old, strict=True) for i in range(n)]


def widened(old: Tensor, new: Tensor, rows: Places, columns: Places, scale: float = 1.0) -> None:
    """Put ``old`` into ``new`` in place; other rows of its columns become zero."""
    new[:, columns] = 0
    new[torch.tensor(rows)[:, None], torch.tensor(columns)] = old * scale


def linear(
    old: EquivariantLinear, new: EquivariantLinear, rows: list[Places], columns: list[Places]
) -> None:
    """Widen a map of each degree; its outputs are divided by the root of the number of inputs."""
    for degree, (before, after) in enumerate(zip(old.weights, new.weights, strict=False)):
        if before.shape[0]:
            scale = math.sqrt(after.shape[0] / before.shape[0])
            widened(before, after.data, rows[degree], columns[degree], scale)
        else:
            after.data[:, columns[degree]] = 0


def by_degree(old: Sequence[int], new: Sequence[int]) -> list[Places]:
    """Give the places of old channels for each degree of the new ones."""
    padded = (*old, *[0] * (len(new) - len(old)))
    return [joined([a], [b]) for a, b in zip(padded, new, strict=True)]


def paths_of(old: FacetBlock, new: FacetBlock) -> Iterator[tuple[int, int, int]]:
    """Give degree, old and new channels of each path of the new block; paths may be new."""
    for path in new.signature.paths:
        width = old.signature.channels[path[0]] if path in old.signature.paths else 0
        yield path[2], width, new.signature.channels[path[0]]


def block(old: FacetBlock, new: FacetBlock) -> None:
    """Widen one block in place."""
    before, after = old.update, new.update
    if not isinstance(before, SphereProductUpdate) or not isinstance(after, SphereProductUpdate):
        raise InputError("only a Facet with node_update: sphere_product can be widened")
    paths = list(paths_of(old, new))
    kernel = old.radial.kernels[0]
    every = list(range(kernel.shape[0]))
    places = joined([a for _, a, _ in paths], [b for _, _, b in paths])
    widened(kernel, new.radial.kernels[0].data, every, places)
    mixed = by_degree(old.after.channels_out, new.after.channels_out)
    sums = [
        joined([a for l3, a, _ in paths if l3 == degree], [b for l3, _, b in paths if l3 == degree])
        for degree in range(len(new.signature.out_channels))
    ]
    linear(old.after, new.after, sums, mixed)
    linear(old.skip, new.skip, by_degree(old.skip.channels_in, new.skip.channels_in), mixed)
    order, widths = before.order, [u.up.channels_out[0] // u.order for u in (before, after)]
    factors = joined([widths[0]] * order, [widths[1]] * order)
    linear(before.up, after.up, mixed, [factors] * len(mixed))
    down = [
        joined([a, *[widths[0]] * (order - 1)], [b, *[widths[1]] * (order - 1)])
        for a, b in zip(old.after.channels_out, new.after.channels_out, strict=True)
    ]
    linear(before.down, after.down, down, by_degree(old.target, new.target))
    first, gates = before.invariants.kernels
    hidden = list(range(first.shape[1]))
    widened(first, after.invariants.kernels[0].data, down[0], hidden)
    absent = [0] * (len(new.target) - len(old.target))
    target = joined([*old.target, *absent], new.target)
    widened(gates, after.invariants.kernels[1].data, hidden, target)
    if old.residual_gain is not None and new.residual_gain is not None:
        new.residual_gain.gain.data[target] = old.residual_gain.gain


def refuse_narrower(old: FacetConfig, new: FacetConfig) -> None:
    """Raise InputError if any width is smaller than before."""
    pairs = [
        (old.message, new.message),
        ((old.embedding, old.outputs), (new.embedding, new.outputs)),
    ]
    pairs += zip(old.hidden, new.hidden, strict=True)
    for before, after in pairs:
        if len(before) > len(after) or any(a > b for a, b in zip(before, after, strict=False)):
            raise InputError(f"{before} channels cannot become {after}: no width may be smaller")
    if len(old.message) != len(new.message):
        raise InputError(
            "message: the highest degree must stay, products on the sphere change with it"
        )


def widen(potential: Potential, seed: int = 0, **widths: object) -> Potential:
    """Give a potential with a wider Facet that predicts the same.

    Args:
        potential: with a Facet.
        seed: of the new weights.
        widths: settings of Facet that change: hidden, message, embedding, outputs.

    Raises:
        InputError: another model, or a width that is smaller than before.
    """
    old = potential.model
    if not isinstance(old, Facet):
        raise InputError("only a Facet can be widened")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        new = create_model("facet", {**old.config.model_dump(mode="json"), **widths})
        assert isinstance(new, Facet)
        refuse_narrower(old.config, new.config)
        new = new.to(potential.dtype)
        new.embedding[:, : old.config.embedding] = old.embedding
        for before, after in zip(old.blocks, new.blocks, strict=True):
            block(before, after)  # type: ignore[arg-type]
        outputs = list(range(old.config.outputs))
        widened(old.head.kernels[0], new.head.kernels[0].data, outputs, [0])
        new.radial_basis.load_state_dict(old.radial_basis.state_dict())
    return Potential(
        new,
        reference_energies=potential.reference_energies,
        scale=potential.scale,
        shift={z: float(potential._shift[z]) for z in potential.elements},
        zbl=potential.zbl is not None,
        metadata=potential.metadata,
    )


def numbers(text: str) -> list[int]:
    """Read ``"64,32"``."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Parse the command line and write the wider potential."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("potential")
    parser.add_argument("out")
    parser.add_argument("--hidden", type=numbers, required=True, help="between the two blocks")
    parser.add_argument("--message", type=numbers, required=True)
    parser.add_argument("--embedding", type=int, required=True)
    parser.add_argument("--outputs", type=int, required=True)
    values = vars(parser.parse_args())
    source, out = load_potential(values.pop("potential"), dtype="float64"), values.pop("out")
    values["hidden"] = [values["hidden"]]
    widen(source, **values).to_dtype(torch.float32).save(out)


if __name__ == "__main__":
    main()
