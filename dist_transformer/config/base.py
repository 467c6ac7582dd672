"""What every configuration section has in common."""

from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError


class Section(BaseModel):
    """One section of the configuration: frozen, no unknown keys, every field's docstring is its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field is, or that it is a list of or may be."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def missing(field: str) -> InitErrorDetails:
    """A field that is needed here although it has a default."""
    return InitErrorDetails(type="missing", loc=(field,), input={})


def unfit(field: str | tuple[str | int, ...], value: Any, message: str) -> InitErrorDetails:
    """A value that does not go with others of its section; the sentence begins with the field and the value.

    Args:
        field: Its name, or its path inside the section.
        value: What was given.
        message: What is wrong and what would be valid.
    """
    loc = field if isinstance(field, tuple) else (field,)
    return InitErrorDetails(type=PydanticCustomError("unfit", message), loc=loc, input=value)


def refuse(section: str, problems: Iterable[InitErrorDetails]) -> None:
    """Report problems of a section from its validator, each under its own field.

    Raises:
        ValidationError: if there are any.
    """
    if problems := list(problems):
        raise ValidationError.from_exception_data(section, problems)
