"""What every configuration section has in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section of the configuration: frozen, no unknown keys, every field's docstring is its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )
