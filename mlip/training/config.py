"""Settings of a training run: strict models, YAML with overrides, the resolved file.

Nothing here looks at the data; settings left at None are chosen from it in `mlip.training.choose`.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from mlip.errors import InputError
from mlip.files import atomic_write

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Label = Literal["energy", "forces", "stress"]
ReferenceChoice = Annotated[
    Annotated[dict[str, float], Tag("<table>")]
    | Annotated[Literal["fit", "isolated"], Tag("<word>")],
    Discriminator(lambda value: "<table>" if isinstance(value, Mapping) else "<word>"),
]


class SetConfig(_Settings):
    """One of several data sets that are mixed.

    The same `name` in `data.valid` or `data.test` and in `data.train` says that the energies have
    the same zero: they are shifted alike.
    """

    paths: tuple[str, ...] = Field(min_length=1)
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None  # None: the file's
    weight: Positive = 1.0  # expected appearances of each structure in an epoch of training
    labels: tuple[Label, ...] | None = None  # the others are ignored; None: all
    reference_energies: ReferenceChoice | None = None  # this set's own zero; None: the common one
    energy_convention: Literal["total", "adsorption"] | None = None
    is2re: Literal["initial", "relaxed"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_path_is_a_list(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and isinstance(values.get("paths"), str):
            return {**values, "paths": [values["paths"]]}
        return values


def _as_list(sources: Any) -> Any:
    """Take one path or set as a list, and a path among sets as a set."""
    items = [sources] if isinstance(sources, str | Mapping) else sources
    if isinstance(items, list | tuple) and any(isinstance(x, Mapping) for x in items):
        return [{"paths": [x]} if isinstance(x, str) else x for x in items]
    return items


def _sources_kind(value: Any) -> str:
    items = value if isinstance(value, list | tuple) else ()
    return "<sets>" if any(isinstance(x, Mapping | SetConfig) for x in items) else "<paths>"


_PathList = Annotated[tuple[str, ...], Field(min_length=1), Tag("<paths>")]
_SetList = Annotated[tuple[SetConfig, ...], Tag("<sets>")]
Sources = Annotated[_PathList | _SetList, Discriminator(_sources_kind)]


class DataConfig(_Settings):
    """Where the structures come from and how they are read.

    `train`, `valid` and `test` are lists of files (one data set), or lists of data sets.
    """

    train: Sources
    valid: Sources | None = None  # None: `valid_fraction` of every training set
    test: Sources | None = None  # evaluated once, at the end
    valid_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    keys: dict[str, str] | None = None  # label names, e.g. {energy: REF_energy}
    energy_convention: Literal["total", "adsorption"] | None = None  # of sets that do not say
    is2re: Literal["initial", "relaxed"] | None = None  # likewise
    on_bad: Literal["raise", "skip", "quarantine"] = "raise"  # structures that cannot be used
    max_edges: Count | None = None  # larger structures are left out of the training set
    memory_limit_GB: NonNegative = 4.0  # graphs are kept in memory below this size
    workers: Annotated[int, Field(ge=0)] = 0  # loader processes, used above that size
    start_method: Literal["fork", "spawn", "forkserver"] | None = None  # of the workers

    @model_validator(mode="before")
    @classmethod
    def _one_path_is_a_list(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        lists = {k: _as_list(values[k]) for k in SPLITS if k in values}
        return {**values, **lists}

    @model_validator(mode="after")
    def _check_sets(self) -> DataConfig:
        for split in SPLITS:
            names = [each.name for each in self.sets(split)]
            double = next((n for n in names if names.count(n) > 1), None)
            if double is not None:
                raise ValueError(f"two sets of data.{split} are called {double!r}: name them apart")
            if split != "train" and any(each.weight != 1 for each in self.sets(split)):
                raise ValueError(f"data.{split}: a weight has a meaning in training only")
        return self

    def sets(self, split: str) -> tuple[SetConfig, ...]:
        """Give the data sets of ``"train"``, ``"valid"`` or ``"test"``, named and complete.

        A plain list of files is one set. Names that are not given come from the first file; only
        a given one makes a set of ``"valid"`` or ``"test"`` the same as one of ``"train"``.
        """
        sources = getattr(self, split) or ()
        if sources and isinstance(sources[0], str):
            sources = (SetConfig(paths=sources),)
        defaults = {"energy_convention": self.energy_convention, "is2re": self.is2re}
        taken = {each.name for each in self.sets("train")} if split != "train" else set()
        complete = []
        for number, each in enumerate(sources, start=1):
            changes: dict[str, Any] = {
                k: v for k, v in defaults.items() if getattr(each, k) is None
            }
            stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(each.paths[0]).name.split(".")[0])
            stem = stem.strip("-") or f"set{number}"
            changes["name"] = each.name or (f"{stem}.{split}" if stem in taken else stem)
            complete.append(each.model_copy(update=changes))
        return tuple(complete)


SPLITS = ("train", "valid", "test")


class LossConfig(_Settings):
    """Weights and shape of the loss; residuals in eV per atom, eV/Å and eV/Å³.

    ``huber`` is |x| − δ/2 beyond δ and x²/(2δ) within it, so that its slope is one at large
    residuals whatever δ is; ``l1`` is |x|, ``mse`` is x².
    """

    kind: Literal["huber", "l1", "mse"] = "huber"
    energy_weight: NonNegative = 1.0
    forces_weight: NonNegative = 10.0
    stress_weight: NonNegative = 10.0
    energy_weight_final: NonNegative | None = None  # takes over at `switch_fraction`
    switch_fraction: Fraction = 0.7
    energy_delta: Positive = 0.01
    forces_delta: Positive = 0.1
    stress_delta: Positive = 0.01
    normalised: bool = False  # divide residuals by the scale of the potential (the force RMS)
    stress_by_component: bool = False  # mean penalty of nine numbers, not of the tensor's length


class OptimizerConfig(_Settings):
    """AdamW; the weight decay acts on the weights of linear maps only."""

    lr: Positive = 5e-3
    weight_decay: NonNegative = 1e-5
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8
    amsgrad: bool = False


class ScheduleConfig(_Settings):
    """Linear warm-up, then a cosine that reaches `lr_min_fraction` at the end of the run."""

    warmup_steps: Annotated[int, Field(ge=0)] = 100
    warmup_epochs: Positive | None = None  # takes the place of `warmup_steps`
    warmup_start: Fraction = 0.0  # of the learning rate
    lr_min_fraction: Fraction = 0.01


class DenoisingConfig(_Settings):
    """Denoising in pre-training (DeNS): see docs/training.md. Validation has no noise."""

    probability: Fraction = 0.5  # of noise in a batch
    ratio: Fraction = 0.5  # probability of an atom of such a batch to be moved
    sigma: Positive = 0.025  # standard deviation of each component of a displacement, Å
    strict_max_ratio: Fraction = 0.75  # structures with more atoms selected are left alone
    max_force: Positive | None = None  # eV/Å; structures with a larger one are left alone
    weight: NonNegative = 10.0  # of moved atoms, where others have `loss.forces_weight`


class BatchConfig(_Settings):
    """Size of a batch (of one process): both budgets hold."""

    max_edges: Count | None = None  # None: chosen from the data
    max_atoms: Count | None = None  # None: no limit


class CheckpointConfig(_Settings):
    """How often the state that `--resume` needs is written (also at the end)."""

    minutes: Positive = 2.0
    steps: Count | None = None


class TrainConfig(_Settings):
    """A training run. None means: chosen from the data and written to the resolved file."""

    data: DataConfig
    model: dict[str, Any] = Field(
        default_factory=dict
    )  # with `initial`: what shall differ from its model
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    batch: BatchConfig = BatchConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    denoising: DenoisingConfig | None = None
    epochs: Count | None = None
    max_steps: Count | None = None  # ends the run earlier; the schedule is fitted to it
    max_time_minutes: Positive | None = None  # likewise; such a run is not reproducible bit for bit
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999  # 0 switches it off
    gradient_clip: Positive | None = 10.0
    reference_energies: ReferenceChoice | None = None  # eV per element; None: "fit"
    zbl: bool = False
    initial: str | None = None  # potential to go on from: its model, weights, references, scale
    initial_reset: tuple[str, ...] = ()  # sub-modules that start from new weights all the same
    precision: Literal["float32", "float64"] = "float32"
    device: str = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    tensorboard: bool = False
    level_of_theory: str | None = None
    licence: str | None = None
    out: str | None = None  # run folder; None: runs/<name of the data>

    @model_validator(mode="before")
    @classmethod
    def _name_the_model(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not isinstance(values.get("model", {}), Mapping):
            return values
        default = {} if values.get("initial") else {"name": "facet"}
        return {**values, "model": {**default, **values.get("model", {})}}

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        loss = self.loss
        final = loss.energy_weight if loss.energy_weight_final is None else loss.energy_weight_final
        if max(loss.energy_weight, final, loss.forces_weight, loss.stress_weight) == 0:
            raise ValueError("all loss weights are zero: nothing would be learned")
        if self.initial_reset and self.initial is None:
            raise ValueError("initial_reset needs initial, the potential whose weights it replaces")
        return self


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> TrainConfig:
    """Read a YAML file and apply ``a.b=c`` overrides.

    Raises:
        InputError: missing file, bad YAML, or a setting that is unknown or out of range.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"configuration file {path} not found") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping such as  data: {{train: frames.extxyz}}")
    return build_config(values, overrides, source=str(path))


def build_config(
    values: Mapping[str, Any], overrides: Iterable[str] = (), *, source: str = "settings"
) -> TrainConfig:
    """Validate settings given as nested mappings, after applying ``a.b=c`` overrides.

    Raises:
        InputError: an unknown key (the text names the nearest one) or a bad value.
    """
    try:
        merged = json.loads(json.dumps(values))
    except (TypeError, ValueError) as error:
        raise InputError(f"{source}: only plain values are allowed ({error})") from None
    for override in overrides:
        apply_override(merged, override)
    try:
        return TrainConfig.model_validate(merged)
    except ValidationError as error:
        raise InputError(f"{source}: " + describe_errors(error, TrainConfig)) from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one entry of nested mappings in place from ``a.b=c`` (c is read as YAML)."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {override!r}: expected  key.subkey=value")
    *parents, last = key.strip().split(".")
    node = values
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise InputError(f"--set {override!r}: {part!r} is a value, not a group of settings")
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override!r}: cannot read the value: {error}") from None


def write_config(config: TrainConfig, path: str | os.PathLike[str]) -> None:
    """Write all settings as YAML that `load_config` reads back to an equal object."""
    values = config.model_dump(mode="json")
    with atomic_write(path, "w") as file:
        yaml.safe_dump(values, file, sort_keys=False)


def describe_errors(error: ValidationError, model: type[BaseModel]) -> str:
    """Say in one line per problem which setting is wrong, with the nearest known name."""
    return "; ".join(_describe(item, model) for item in error.errors())


def _describe(item: Any, model: type[BaseModel]) -> str:
    location = [str(part) for part in item["loc"] if not _is_tag(part)]
    name = ".".join(location)
    if item["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        return f"unknown setting {name!r}: {hint}"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{name or 'settings'}: {message} (got {item['input']!r})" if name else message


def _is_tag(part: Any) -> bool:
    """Recognise what pydantic adds to a place where a type was chosen."""
    return isinstance(part, str) and part.startswith("<")


def _fields_at(model: type[BaseModel], location: list[str]) -> list[str]:
    for part in location:
        if part.isdecimal():  # place in a list
            continue
        field = model.model_fields.get(part)
        inner = _model_within(field.annotation) if field else None
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _model_within(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_within, get_args(annotation))), None)
