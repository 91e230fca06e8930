"""Read a plan of a sequence from its YAML file."""

import os
import re
from pathlib import Path
from typing import Any

import draccus
import yaml

from craft_ds.commands.sequence_plan import SequencePlan
from craft_ds.config.checks import require
from craft_ds.config.secret_scan import redact, refuse_secrets
from craft_ds.errors import UserError, one_line


def read_plan(path: Path) -> SequencePlan:
    """Read and validate a plan.

    Raises:
        UserError: The file cannot be read, holds a key, or the plan is wrong; names the file and the key.
    """
    try:
        content = _UniqueKeys(path.read_text(encoding="utf-8")).get_single_data()
        require(isinstance(content, dict), "must hold a mapping of keys to values")
        refuse_secrets(content)
        plan = _with_home(draccus.decode(SequencePlan, _without_nulls(content)))
        plan.validate()
    except yaml.YAMLError as error:  # its text quotes the file, which may hold a secret
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        why = redact(one_line(getattr(error, "problem", None) or type(error).__name__, 100))
        raise UserError(f"{path}: not readable ({why}{where})") from None
    except draccus.utils.DecodingError as error:
        message = str(error).split("\n")[0].removeprefix("`").replace("`:", ":", 1)
        message = re.sub(r'into field "<class .*>\.(\w+)"| \(<class .*?>\)', "", message)
        raise UserError(f"{path}: {redact(message)}") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not readable ({one_line(error)})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return plan


def _with_home(plan: SequencePlan) -> SequencePlan:
    """Expand a leading `~` in the plan's paths, as the commands do in their arguments."""
    home = os.path.expanduser
    plan.output_dir, plan.start.policy = home(plan.output_dir), home(plan.start.policy)
    plan.evaluation.references = [home(path) for path in plan.evaluation.references]
    for part in plan.parts().values():
        for place in (part, part.heldout, *getattr(part, "datasets", ())):
            if place is not None and place.root is not None:
                place.root = home(place.root)
    return plan


def _without_nulls(content: Any) -> Any:
    """Leave out keys without a value, but for flags, where that is an error."""
    if isinstance(content, list):
        return [_without_nulls(value) for value in content]
    if not isinstance(content, dict):
        return content
    return {
        key: value if key in ("train", "anchors") and value is not None else _without_nulls(value)
        for key, value in content.items()
        if value is not None
    }


class _UniqueKeys(yaml.SafeLoader):
    """Safe loader that refuses a key given twice: YAML would use the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = (key.tag, key.value if isinstance(key, yaml.ScalarNode) else id(key))
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(name)
        return node
