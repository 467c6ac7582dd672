"""A batch script from a template: its `#SBATCH` lines set, everything else as the person who edits it left it."""

import re
from collections.abc import Collection, Mapping

_OPTION = re.compile(r"^##?SBATCH --([a-z][a-z-]*)(?:[= ](.*))?$")


def render(template: str, options: Mapping[str, str | None], without: Collection[str] = ()) -> str:
    """Set options in a batch script.

    An option that the template has, also as an optional line (`##SBATCH`), is set in place; others follow the last one.

    Args:
        options: `partition` to `gpu`, say; None for a flag without a value.
        without: Options whose lines are left out.
    """
    left = dict(options)
    lines: list[str] = []
    last = 0
    for line in template.splitlines():
        match = _OPTION.match(line)
        if match and match[1] in without:
            continue
        if match and match[1] in options:
            # Set once; a second line of the same option would win over it.
            if match[1] not in left:
                continue
            line = _line(match[1], left.pop(match[1]))
        lines.append(line)
        if match and line.startswith("#SBATCH"):
            last = len(lines)
    lines[last:last] = [_line(name, value) for name, value in left.items()]
    return "\n".join(lines) + "\n"


def _line(name: str, value: str | None) -> str:
    return f"#SBATCH --{name}" if value is None else f"#SBATCH --{name}={value}"
