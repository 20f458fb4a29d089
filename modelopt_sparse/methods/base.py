"""What a sparse attention method is: a configuration class and the plan that it makes of it."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Generic, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from modelopt_sparse.errors import ArgumentTypeError, ConfigError, describe, shown_key
from modelopt_sparse.kernels.types import Plan


class PlanHolder(Protocol):
    """What a method needs of a module: `modelopt_sparse.SparseAttentionModule` has it."""

    active_plan: Plan | None


class SparseMethodConfig(BaseModel):
    """Base of every method's configuration: frozen, and nothing but its own fields is taken.

    A subclass declares ``method: Literal["its_name"] = "its_name"`` and its fields, each with a
    default. A value that isn't taken raises pydantic.ValidationError, a ValueError that names the
    field.

    Args:
        method: the name by which configurations choose it.
        backend: "triton" runs the Triton kernels on GPU tensors and the torch reference on CPU tensors;
            "pytorch" always runs the torch reference.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Names that users write for a field, mapped to the field's own name.
    aliases: ClassVar[Mapping[str, str]] = {}
    # Names that are not taken, mapped to the field to use instead.
    abandoned: ClassVar[Mapping[str, str]] = {}

    method: str
    backend: Literal["triton", "pytorch"] = "triton"

    @model_validator(mode="before")
    @classmethod
    def _own_fields_only(cls, data: Any) -> Any:
        return cls.canonical(data) if isinstance(data, Mapping) else data

    @classmethod
    def canonical(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """The same values under the fields' own names.

        Raises:
            ConfigError: a key is not a field, and the message names the nearest one; or a field is
                given twice, by its name and an alias.
        """
        canonical: dict[str, Any] = {}
        for key, value in data.items():
            name = cls.aliases.get(key, key)
            if name not in cls.model_fields:
                raise ConfigError(cls._unknown_key(key))
            if name in canonical:
                raise ConfigError(f"{name}: given twice, once as an alias; takes one of the names.")
            canonical[name] = value
        return canonical

    @classmethod
    def check_field(cls, name: str, value: Any) -> Any:
        """`value` as the field `name` keeps it, whatever the other fields are.

        Raises:
            pydantic.ValidationError: the field doesn't take the value.
        """
        try:
            return getattr(cls.model_validate({name: value}), name)
        except ValidationError as error:
            if any(line["loc"] for line in error.errors()):
                raise
        # Only a relation between fields is broken, and the other field may get another value yet.
        field = cls.model_fields[name]
        annotated: Any = Annotated
        return TypeAdapter(annotated[field.annotation, field]).validate_python(value)

    @classmethod
    def _unknown_key(cls, key: object) -> str:
        if key == "calibration":
            return f"{not_a_field(cls, key)} Put it beside sparse_cfg, for it is about all rules."
        near = nearest(key, [*cls.abandoned, *cls.model_fields, *cls.aliases])
        return not_a_field(cls, key, cls.abandoned.get(str(near), near))


def not_a_field(config: type[BaseModel], key: object, near: str | None = None) -> str:
    """What is said of a key that `config` has no field for; `near` is what it may stand for."""
    fields = ", ".join(config.model_fields)
    said = f"{shown_key(key)}: not a field of {config.__name__}; takes {fields}."
    return said + (f" Did you mean {near}?" if near else "")


def nearest(key: object, names: Iterable[str]) -> str | None:
    """The one of `names` that `key` probably stands for, None if none is near."""
    names, text = list(names), str(key)[:100]
    close = difflib.get_close_matches(text, names, n=1, cutoff=0.5)
    return next(iter(close or [name for name in names if text and text in name]), None)


C = TypeVar("C", bound=SparseMethodConfig)


class SparseMethod(ABC, Generic[C]):
    """One way of leaving attention work out. Subclass, set `Config`, write `plan`, register.

    The instance belongs to one module and holds that module's frozen configuration.

    Raises:
        ArgumentTypeError: the configuration is another method's.
    """

    Config: ClassVar[type[SparseMethodConfig]]

    def __init__(self, config: C):
        if not isinstance(config, self.Config):
            raise ArgumentTypeError(
                describe("config", type(config).__name__, f"a {self.Config.__name__}")
            )
        self.config = config

    @abstractmethod
    def plan(self) -> Plan:
        """What the kernel shall leave out, as plain numbers."""

    @contextmanager
    def get_sparse_context(self, module: PlanHolder) -> Iterator[Plan]:
        """Puts the plan in force for one call of `module`, and the previous one back afterwards."""
        plan = self.plan()
        previous = module.active_plan
        module.active_plan = plan
        try:
            yield plan
        finally:
            module.active_plan = previous
