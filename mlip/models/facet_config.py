"""Settings of Facet."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mlip.nn.mlp import Activation


class FacetConfig(BaseModel):
    """Everything that defines a Facet but its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    elements: tuple[int, ...] = Field(min_length=1, description="atomic numbers it knows")
    cutoff: float = Field(5.0, gt=0, description="neighbour cutoff, Å")
    hidden: tuple[tuple[int, ...], ...] = Field(
        ((32, 32, 32), (32, 32, 32)), description="channels of l = 0, 1, … after each block"
    )
    message: tuple[int, ...] | None = Field(
        None,
        description="channels of the summed messages, which may reach higher degrees than the "
        "features that travel (sphere_product only); default: as the block's features",
    )
    embedding: int = Field(32, gt=0, description="channels of the element embedding")
    outputs: int = Field(32, gt=0, description="scalars of the last block")
    lmax_edge: int | None = Field(None, ge=0, description="edge harmonics; default as hidden")
    natural_parity: bool = Field(True, description="products that conserve (−1)^l: O(3)")
    average_neighbors: float = Field(30.0, gt=0)
    neighbor_power: float = Field(0.5, description="messages are divided by neighbours^power")

    n_radial: int = Field(8, gt=0)
    radial_basis: Literal["sine", "gaussian"] = "sine"
    radial_hidden: tuple[int, ...] = Field((), description="hidden layers of a radial MLP")
    radial_activation: Activation = "normalized_silu"
    envelope: Literal["polynomial", "exponential", "xplor"] = "polynomial"
    envelope_order: int = Field(5, ge=3, description="p of the polynomial envelope")
    envelope_start: float = Field(0.8, gt=0, lt=1, description="of the published envelopes")
    envelope_curvature: float = Field(0.1, gt=0, description="c of the exponential envelope")
    trainable_cutoff: bool = False

    node_update: Literal["sphere_product", "sphere_grid", "gate", "linear"] = "sphere_product"
    product_order: Literal[2, 3] = Field(3, description="factors of the sphere product")
    product_hidden: int = Field(64, gt=0, description="hidden width of its invariant MLP")
    grid: tuple[int, int] = Field((18, 17), description="latitudes and longitudes")
    quadrature: Literal["soft", "gauss_legendre"] = "soft"
    mixer_hidden: tuple[int, ...] = (16,)
    mixer_heads: int = Field(2, gt=0)
    activation: Activation = "silu"
    final_activation: Activation = "identity"
    mixer_normalization: bool = False

    linear_before: bool = Field(False, description="mix channels before the convolution")
    block_residual: bool = True
    residual_normalization: bool = Field(False, description="layer norm before the residual")
    output_normalization: bool = Field(False, description="layer norm after the block")
    readout: Literal["last", "mean", "sum"] = "last"
    readout_linear: bool = False
    head_hidden: tuple[int, ...] = ()
    head_activation: Activation = "silu"
    head_normalization: bool = False
    rescale: Literal["none", "species_sum", "sevennet"] = Field(
        "none", description="published rescaling; species_sum is not size-extensive"
    )

    @model_validator(mode="after")
    def _check(self) -> FacetConfig:
        if len(set(self.elements)) != len(self.elements):
            raise ValueError("elements holds an atomic number twice")
        if any(not 1 <= z <= 118 for z in self.elements):
            raise ValueError("elements are atomic numbers from 1 to 118")
        for channels in self.hidden:
            if len(channels) < 2 or min(channels) < 0 or 0 in (channels[0], channels[-1]):
                raise ValueError(
                    "each entry of hidden needs channels for l = 0 and for its highest l, which is "
                    "1 or more; 0 leaves out a degree between them"
                )
        if self.message is not None:
            if self.node_update != "sphere_product":
                raise ValueError("message needs node_update: sphere_product")
            if len(self.message) < 2 or min(self.message) < 1:
                raise ValueError("message needs channels for l = 0 and l = 1 at least")
            if len(self.message) < max(len(channels) for channels in self.hidden):
                raise ValueError("message must reach the highest degree of hidden")
        return self
