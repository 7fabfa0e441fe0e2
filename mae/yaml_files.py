"""YAML files of settings, read strictly."""

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
    except yaml.YAMLError as error:
        raise UserError(f"settings file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"settings file {path} has too many lists in lists, or sections in sections") from None
    if not isinstance(tree, dict):
        raise UserError(f"settings file {path} must hold a mapping of settings, not {type(tree).__name__}")
    return tree


class _StrictLoader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys and keys that are not text, which PyYAML silently accepts.

    Repetitions (`*name`) are few, because each may double what a few lines stand for.
    """

    _repetitions = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._repetitions += self.check_event(yaml.AliasEvent)
        if self._repetitions > _MOST_REPETITIONS:
            raise yaml.composer.ComposerError(None, None, f"more than {_MOST_REPETITIONS} repetitions (*name)", None)
        return super().compose_node(parent, index)

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
