"""YAML files of settings, read strictly."""

import re
from pathlib import Path
from typing import Any

import yaml

from mae.errors import UserError
from mae.files import read_bounded

_MOST_BYTES, _MOST_REPETITIONS = 1 << 24, 16


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping, and refuse tags and duplicate keys.

    Raises:
        UserError: if the file is missing, is not YAML or is not a mapping.
    """
    try:
        text = read_bounded(path, _MOST_BYTES).decode("utf-8")
        tree = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError:
        raise UserError(f"settings file {path} does not exist; check the path given to --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"settings file {path} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, KeyError) as error:  # the last two for values such as !!int x and 2020-13-01
        raise UserError(f"settings file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"settings file {path} has too many lists in lists, or sections in sections") from None
    if not isinstance(tree, dict):
        raise UserError(f"settings file {path} must hold a mapping of settings, not {type(tree).__name__}")
    return tree


_DECIMAL = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)")


class _StrictLoader(yaml.SafeLoader):
    """YAML loader that refuses what PyYAML silently accepts: duplicate keys, keys that are not text, odd numbers.

    It would read 010 as 8 and 1:30 as 90.

    Repetitions (`*name`) are few, because each may double what a few lines stand for.
    """

    _repetitions = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._repetitions += self.check_event(yaml.AliasEvent)
        if self._repetitions > _MOST_REPETITIONS:
            raise yaml.composer.ComposerError(None, None, f"more than {_MOST_REPETITIONS} repetitions (*name)", None)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and "\0" in value:
            raise yaml.constructor.ConstructorError(None, None, "text with a null character", node.start_mark)
        return value

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        is_whole = node.tag == "tag:yaml.org,2002:int"
        if ":" in node.value or (is_whole and not _DECIMAL.fullmatch(node.value)):
            found = f"{node.value[:40]!r}; allowed: decimal numbers such as 10 and 1e-3, and text in quotes"
            raise yaml.constructor.ConstructorError(None, None, found, node.start_mark)
        return self.construct_yaml_int(node) if is_whole else self.construct_yaml_float(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=deep)
            if not isinstance(name, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} is not text", node.start_mark)
            if name in keys:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {name!r}", node.start_mark)
            keys.add(name)
        return super().construct_mapping(node, deep)


for _tag in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _StrictLoader.construct_number)
